"""deploy/ and the server agree: flags, paths, ports, time to end."""

import json
import os
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import tyro
import yaml

from jaxspec.cli.commands import read_command
from jaxspec.serving.speculative import SpeculativeConfig

DEPLOY = Path(__file__).parents[1] / "deploy"
LAST_WORDS_SECONDS = 5


def dockerfile() -> dict[str, str]:
    """The last value of each instruction."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return dict(line.split(" ", 1) for line in lines if line and not line.startswith("#"))


def entry() -> list[str]:
    return json.loads(dockerfile()["ENTRYPOINT"])


def manifests(name: str) -> tuple[dict, dict]:
    """Deployment and service."""
    made = list(yaml.safe_load_all((DEPLOY / name).read_text()))
    assert [each["kind"] for each in made] == ["Deployment", "Service"]
    return made[0], made[1]


def test_the_image_runs_the_command_with_flags_that_it_has():
    program, command, *flags = entry()
    assert (program, command) == ("jaxspec", "serve")
    serve = read_command([command, *flags, *json.loads(dockerfile()["CMD"])], "jaxspec")
    assert serve.host == "0.0.0.0" and str(serve.port) == dockerfile()["EXPOSE"]
    assert dockerfile()["STOPSIGNAL"] == "SIGTERM"


def test_the_image_copies_all_that_the_package_is_made_of():
    root = DEPLOY.parent
    copied = {
        part
        for line in (DEPLOY / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for part in line.split()[1:-1]
    }
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "jaxspec"} and all(
        (root / each).exists() for each in copied
    )


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes-tpu.yaml"])
def test_a_deployment_starts_probes_and_ends_the_server_as_it_is(name):
    deployment, service = manifests(name)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    serve = read_command([*entry()[1:], *container["args"]], "jaxspec")
    config = SpeculativeConfig.parse(serve.speculative_config)
    assert config.method == "vispec" and config.model and serve.model.dtype == "bfloat16"
    (port,) = container["ports"]
    assert port["containerPort"] == serve.port
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    program = container["readinessProbe"]["exec"]["command"][-1]
    compile(program, "probe", "exec")
    assert f"http://127.0.0.1:{serve.port}/ready" in program and "JAXSPEC_API_KEY" in program
    (variable,) = container["env"]
    assert variable["name"] == "JAXSPEC_API_KEY" and "value" not in variable
    waited = int(shlex.split(" ".join(container["lifecycle"]["preStop"]["exec"]["command"]))[-1])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= waited + serve.shutdown_timeout + LAST_WORDS_SECONDS + 10
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    accelerator = "google.com/tpu" if "tpu" in name else "nvidia.com/gpu"
    assert container["resources"]["limits"][accelerator] == "1"


def test_a_ray_service_has_options_that_there_are_and_machines_that_fit_them():
    """What Ray Serve does with the file: the arguments become flags, which the program reads strictly."""
    (service,) = yaml.safe_load_all((DEPLOY / "rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    if not (find_spec("ray") or os.environ.get("CI")):
        pytest.skip("ray is not installed")
    ray_serve = import_module(module)
    assert callable(getattr(ray_serve, name))
    options = tyro.cli(ray_serve.RayServe, args=ray_serve.flags(application["args"]))
    options.check()
    assert {name.replace("-", "_") for name in application["args"]} <= {"model", "dtype"} | set(vars(options))
    speculative = options.speculative
    assert (speculative.method, bool(speculative.model), options.model.dtype) == ("vispec", True, "bfloat16")
    assert options.replicas <= options.max_replicas and options.model.tensor <= options.num_gpus

    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert workers["maxReplicas"] >= options.max_replicas  # a machine for each
    pods = [service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        (variable,) = container["env"]
        assert variable["name"] == "JAXSPEC_API_KEY" and "value" not in variable
        assert pod["terminationGracePeriodSeconds"] >= options.shutdown_timeout + LAST_WORDS_SECONDS + 10
    assert container["resources"]["limits"]["nvidia.com/gpu"] >= options.num_gpus
    assert container["resources"]["requests"]["cpu"] >= options.num_cpus
