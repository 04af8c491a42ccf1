"""The floor: errors, configuration, records and the device, with no model and no import from the rest of the package."""
