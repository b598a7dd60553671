"""Where vLLM 0.32 runs small floats in blocks, for a person: no CPU, and GPUs by what their kernels do with inputs."""

from lowbit_quantize.schemes.scheme import ExpertSupport

CPU_MISSING = "vLLM has no CPU kernel for {scheme}"
NVIDIA_OLDER = "with inputs as they are from 7.5 (Turing) on (Marlin)"
AMPERE = "with inputs as they are from 8.0 (Ampere) on (Marlin)"
# `_POSSIBLE_NVFP4_KERNELS`, `_POSSIBLE_MXFP4_KERNELS`, `_POSSIBLE_MXFP8_KERNELS` of vLLM 0.32.
GPUS = {
    "NVFP4": f"NVIDIA's from 10.0 (Blackwell) on, {NVIDIA_OLDER}; AMD's by emulation",
    "NVFP4A16": "NVIDIA's from 7.5 (Turing) on (Marlin)",
    "MXFP4": f"NVIDIA's from 10.0 (Blackwell) on, {AMPERE}; AMD's from MI350 on",
    "MXFP4A16": "NVIDIA's from 8.0 (Ampere) to 9.0 (Hopper) (Marlin); Blackwell and AMD's round its inputs as MXFP4's",
    "MXFP8": f"NVIDIA's from 10.0 (Blackwell) on, {NVIDIA_OLDER}; AMD's from MI350 on, older ones by emulation",
}
# transformers 5.19 unpacks experts of packed integers and of FP8 by channel only.
EXPERTS = {name: ExpertSupport(f"{gpus}; no CPU", opened=False) for name, gpus in GPUS.items()}
