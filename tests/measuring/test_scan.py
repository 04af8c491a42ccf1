"""`mambacus bench scan` times the scan beside its limits and its error."""

from __future__ import annotations

import pytest
import torch

from mambacus import bench
from mambacus.measuring.exact import GRADIENTS
from mambacus.measuring.scan import limits_ms, scan_inputs
from mambacus.runtime.errors import UserError
from mambacus.runtime.records import read_record


def test_a_record_has_times_limits_and_errors_of_every_tensor(tmp_path, capsys):
    out = tmp_path / "scan.json"
    bench.main(["scan", "--out", str(out), "--shapes", "2x40x33", "--dtypes", "float32,bfloat16", "--threads", "1"])
    rows = read_record(out).results["rows"]
    assert [(row["shape"], row["dtype"]) for row in rows] == [([2, 40, 33], "float32"), ([2, 40, 33], "bfloat16")]
    for row, bound in zip(rows, (3e-6, 1e-2), strict=True):
        assert row["forward_ms"] > 0 and row["both_ms"] > row["bytes_limit_ms"] > 0
        names = {"y", "final_state", "y_inference", "final_state_inference", *GRADIENTS}
        assert row["checked_shape"] == [2, 40, 33]
        assert row["errors"].keys() == names and max(row["errors"].values()) < bound
        assert "mamba_ssm_h100_ms" not in row
    printed = capsys.readouterr().out
    assert "2x40x33" in printed and "mamba-ssm" not in printed


def test_limits_count_every_tensor_once():
    limits = limits_ms((2, 32, 100), torch.bfloat16, {"copy_gb_s": 1.0, "exponentials_per_s": 1e9})
    assert limits["bytes_limit_ms"] == pytest.approx(2 * 100 * (4 * 32 + 2 * 16) * 2 / 1e6)
    assert limits["exponentials_limit_ms"] == pytest.approx(2 * 32 * 100 * 16 / 1e6)
    assert limits_ms((2, 32, 100), torch.bfloat16, {"copy_gb_s": 1.0}).keys() == {"bytes_limit_ms"}


def test_inputs_are_the_same_every_time():
    first, second = (scan_inputs((1, 8, 5), torch.device("cpu"), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", ["8x1536", "8x0x4", "axbxc"])
def test_a_wrong_shape_is_refused(tmp_path, shape):
    with pytest.raises(UserError, match=f"--shapes: expected batch x d_inner x seqlen .* got '{shape}'"):
        bench.run(bench.Config("scan", tmp_path / "r.json", shapes=(shape,)))
