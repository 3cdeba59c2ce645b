"""Put the source of mamba-ssm into a folder, for `test_triton.py`. pip would build what it downloads, which takes a
compiler for GPUs.

Usage: python tests/kernels/get_mamba_ssm.py FOLDER
"""

import hashlib
import io
import sys
import tarfile
import urllib.request

URL = (
    "https://files.pythonhosted.org/packages/af/48/aa7bec0efc7453fa0512276c0069c854bf684219050294266534bfef34bb/"
    "mamba_ssm-2.3.2.post1.tar.gz"
)
SHA256 = "104cc47e9101e5401a675fa2b784f2952b9b037f3b1dd83b5ac544394e95d028"

if __name__ == "__main__":
    with urllib.request.urlopen(URL, timeout=120) as answer:
        data = answer.read()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        sys.exit(f"{URL} has the sha256 {found}, expected {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            member.name = member.name.split("/", 1)[-1]  # without the folder of the release
            if member.isfile() and member.name.startswith("mamba_ssm/") and member.name.endswith(".py"):
                archive.extract(member, sys.argv[1], filter="data")
