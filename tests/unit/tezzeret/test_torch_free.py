"""The platform process serves Urza, Tezzeret and Urabrask without ever importing torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["urza", "tezzeret", "urabrask"])
def test_the_service_needs_no_torch(name: str) -> None:
    code = f"import sys, services.{name}.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
