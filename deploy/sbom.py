"""A bill of materials (CycloneDX 1.6, JSON) of the environment in deploy/constraints.lock.

    python deploy/sbom.py > build/sbom.json

It needs nothing but Python. The same lock file gives the same bytes.
"""

import json
import re
import tomllib
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "deploy" / "constraints.lock"


def locked(text: str) -> dict[str, tuple[str, list[str]]]:
    """Version and sha256 digests of every package of a lock file, by name."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        if pin := re.match(r"([\w.-]+)==(\S+)", line):
            digests: list[str] = []
            found[pin[1]] = pin[2], digests
        elif digest := re.match(r"\s+--hash=sha256:([0-9a-f]{64})", line):
            digests.append(digest[1])
    return found


def sbom(text: str, project: dict[str, Any]) -> dict[str, Any]:
    """The bill of materials of a lock file.

    project: the table [project] of pyproject.toml.
    """
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, text)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": project["name"],
                "name": project["name"],
                "version": project["version"],
                "licenses": [{"license": {"id": project["license"]}}],
            }
        },
        "components": [
            component(name, version, digests) for name, (version, digests) in locked(text).items()
        ],
    }


def component(name: str, version: str, digests: list[str]) -> dict[str, Any]:
    """One package. Only one of its files is installed, so each is named as a possible one."""
    purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version.replace('+', '%2B')}"
    files = [{"alg": "SHA-256", "content": digest} for digest in digests]
    reference = {"type": "distribution", "url": f"https://pypi.org/project/{name}/{version}/"}
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        "externalReferences": [{**reference, "hashes": files}],
    }


def main() -> None:
    """Print it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    print(json.dumps(sbom(LOCK.read_text(), project), indent=1))


if __name__ == "__main__":
    main()
