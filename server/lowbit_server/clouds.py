"""The containers' contracts of three clouds, told by the environment: `lowbit serve` without a flag starts there.

- SageMaker runs the image with the argument `serve`: the model is under /opt/ml/model, port 8080 (in a pipeline of
  containers SAGEMAKER_BIND_TO_PORT), GET /ping, POST /invocations.
- Vertex AI: AIP_HTTP_PORT, AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE are its port and its two paths, AIP_STORAGE_URI a
  folder in Cloud Storage, which the container downloads itself; the port must take connections within 40 s.
- Azure ML: AZUREML_MODEL_DIR is the mounted model; port 5001 and POST /score are what its own server has.

Flags and variables `LOWBIT_…` go before what a cloud says. Knows nothing of HTTP and downloads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lowbit_core.errors import ConfigError

HEALTH, PREDICT = ("GET", "/ping"), ("POST", "/invocations")
SAGEMAKERS_MODEL = Path("/opt/ml/model")
EVERY_ADDRESS = "0.0.0.0"  # a container's port is reached from without
SAGEMAKER_VARIABLES = (
    "SM_MODEL_DIR",
    "SAGEMAKER_BIND_TO_PORT",
)  # the first is the toolkits' name for the model's place
VERTEX_VARIABLES = ("AIP_HTTP_PORT", "AIP_HEALTH_ROUTE", "AIP_PREDICT_ROUTE", "AIP_STORAGE_URI")

Aliases = Mapping[tuple[str, str], str]  # (method, path) that a cloud asks for: ours


@dataclass(frozen=True)
class Cloud:
    """What a cloud tells its containers. `model`: a directory or a URI, or empty; `told_by`: what says so."""

    name: str
    told_by: str
    model: str
    port: str
    aliases: Aliases = field(default_factory=dict)

    def settings(self) -> dict[str, str]:
        """The variables of `lowbit serve` that it stands for."""
        return {"LOWBIT_HOST": EVERY_ADDRESS, "LOWBIT_PORT": self.port}


def cloud_of(environment: Mapping[str, str], sagemakers_model: Path = SAGEMAKERS_MODEL) -> Cloud | None:
    """The cloud that this process was started by; raises ConfigError where the environment names two."""
    found = [cloud for cloud in (_vertex(environment), _azure(environment)) if cloud is not None]
    found = found or [cloud for cloud in (_sagemaker(environment, sagemakers_model),) if cloud is not None]
    if len(found) > 1:
        told = " and ".join(f"{cloud.told_by} ({cloud.name})" for cloud in found)
        raise ConfigError(f"the environment has {told}: unset the variables of one of them")
    return found[0] if found else None


def with_cloud(environment: Mapping[str, str], cloud: Cloud | None) -> Mapping[str, str]:
    """The environment with a cloud's settings where it says nothing itself."""
    return environment if cloud is None else {**cloud.settings(), **environment}


def checkpoint_in(cloud: Cloud, root: Path) -> Path:
    """The checkpoint in a cloud's model directory: itself, or the one folder of it that holds one; ConfigError else."""
    if (root / "config.json").is_file():
        return root
    found = sorted(path.parent for path in root.glob("*/config.json")) if root.is_dir() else []
    if len(found) == 1:
        return found[0]
    holds = (
        f"holds {len(found)} checkpoints ({', '.join(path.name for path in found)})"
        if found
        else "holds no checkpoint"
    )
    raise ConfigError(
        f"{cloud.told_by}: {root} {holds}; {cloud.name} must put one there, a config.json in it or in one folder of it"
    )


def _sagemaker(environment: Mapping[str, str], model: Path) -> Cloud | None:
    told_by = next((name for name in SAGEMAKER_VARIABLES if environment.get(name)), None)
    model = Path(environment.get("SM_MODEL_DIR") or model)
    if told_by is None and not model.is_dir():
        return None
    return Cloud("SageMaker", told_by or str(model), str(model), _port(environment, "SAGEMAKER_BIND_TO_PORT"))


def _vertex(environment: Mapping[str, str]) -> Cloud | None:
    told_by = next((name for name in VERTEX_VARIABLES if name in environment), None)
    if told_by is None:
        return None
    model, aliases = environment.get("AIP_STORAGE_URI", ""), dict[tuple[str, str], str]()
    for variable, (method, ours) in (("AIP_HEALTH_ROUTE", HEALTH), ("AIP_PREDICT_ROUTE", PREDICT)):
        if path := environment.get(variable):
            if not path.startswith("/"):
                raise ConfigError(f"{variable}={path}: give a path that begins with a slash")
            aliases[method, path.rstrip("/") or "/"] = ours
    told_by = "AIP_STORAGE_URI" if model else told_by
    return Cloud("Vertex AI", told_by, model, _port(environment, "AIP_HTTP_PORT"), aliases)


def _azure(environment: Mapping[str, str]) -> Cloud | None:
    model = environment.get("AZUREML_MODEL_DIR")
    if not model:
        return None
    return Cloud("Azure ML", "AZUREML_MODEL_DIR", model, "5001", {("POST", "/score"): PREDICT[1]})


def _port(environment: Mapping[str, str], variable: str) -> str:
    port = environment.get(variable) or "8080"
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{variable}={port}: a port is a whole number from 1 to 65535")
    return port
