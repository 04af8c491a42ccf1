"""The floor: errors, configuration, records, output folders and the device; imports nothing else of the package."""
