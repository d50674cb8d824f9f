"""The compose file is valid by the Compose Specification (check-jsonschema ships it) and uses our own commands."""

from __future__ import annotations

import importlib.resources
import json
import re

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def compose(root):
    return yaml.safe_load((root / "deploy" / "compose.yaml").read_text())


def test_it_is_valid(compose):
    schema = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    check = jsonschema.validators.validator_for(found := json.loads(schema.read_text()))(found)
    assert [f"{list(e.path)}: {e.message}" for e in check.iter_errors(compose)] == []
    wrong = {**compose, "services": {**compose["services"], "head": {"restarts": "always"}}}  # the check itself
    assert "restarts" in "".join(e.message for e in check.iter_errors(wrong))


def test_every_variable_has_a_default_or_is_asked_for(root):
    example = (root / "deploy" / ".env.example").read_text()
    for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", (root / "deploy" / "compose.yaml").read_text()):
        assert rest.startswith((":-", ":?", ":+")), name
        if rest.startswith(":?"):
            assert re.search(rf"^{name}=$", example, re.MULTILINE), f"{name} must be asked for in .env.example"


def test_no_port_is_open_to_other_machines(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_what_services_name_exists(compose):
    for name, service in compose["services"].items():
        assert service.get("depends_on", {}).keys() <= compose["services"].keys(), name
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).split(":")[0]
            assert source in compose["volumes"], volume
        for needed in service.get("depends_on", {}).values():
            assert needed["condition"] == "service_healthy"
    assert all(
        "healthcheck" in compose["services"][n] for s in compose["services"].values() for n in s.get("depends_on", {})
    )


def test_the_job_is_a_command_of_ours(compose):
    from metadist.cli.app import app

    words = compose["services"]["job"]["command"]
    assert words[:2] == ["metadist", "submit"]
    help_text = CliRunner().invoke(app, ["submit", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    assert all(word in help_text for word in words if word.startswith("--"))
