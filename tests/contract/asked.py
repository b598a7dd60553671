"""vLLM's own functions, asked about processors that are not here: their code is handed a platform in place of this one.

Copies of the functions are made, and of those that they call, which read other globals; vLLM itself stays as it is.
"""

from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any


def platform(kind: str, capability: int | None = None) -> Any:
    """A platform of vLLM's, by its name in `PlatformEnum`; `capability` is compute capability, times ten."""
    from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

    class Asked(Platform):  # type: ignore[misc]
        _enum = PlatformEnum[kind]
        device_name = device_type = kind.lower()

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return None if capability is None else DeviceCapability(*divmod(capability, 10))

        @classmethod
        def supports_fp8(cls) -> bool:
            return capability is None or capability >= 89

        @classmethod
        def supports_mx(cls) -> bool:
            return False

        @classmethod
        def support_deep_gemm(cls) -> bool:
            return capability is not None and capability // 10 in (9, 10, 12)

    return Asked()


class SaidByCpp:
    """What vLLM's compiled code says of a capability (times ten), by the names of `_custom_ops`."""

    @staticmethod
    def cutlass_group_gemm_supported(capability: int) -> bool:
        return 90 <= capability < 110  # the upper bound is Python's

    @staticmethod
    def mxfp4_experts_quant_supported(capability: int) -> bool:
        return 100 <= capability < 120


def asked(function: Any, instead: Mapping[str, Any], packages: bool) -> Any:
    """A copy of a function that finds `instead` among its globals, by name, and so do those of vLLM's that it calls.

    `packages`: whether what looks for other packages of GPUs (`has_…`) finds them.
    """
    return _copied(function, instead, packages, {})


def _copied(function: Any, instead: Mapping[str, Any], packages: bool, made: dict[Any, Any]) -> Any:
    function = getattr(function, "__func__", getattr(function, "__wrapped__", function))
    if not isinstance(function, FunctionType):
        return function
    if function in made:
        return made[function]
    names: dict[str, Any] = dict(function.__globals__)
    copied = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    made[function] = copied
    for name in _names(function.__code__) & names.keys():
        found = names[name]
        if name in instead:
            names[name] = instead[name]
        elif name.startswith("has_") and "zentorch" not in name:
            names[name] = lambda *_: packages
        elif not isinstance(found, type) and str(getattr(found, "__module__", "")).startswith("vllm"):
            names[name] = _copied(found, instead, packages, made)
    return copied


def _names(code: CodeType) -> set[str]:
    """Every name that code reads, and code inside it."""
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)
