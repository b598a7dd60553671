"""Which runtimes multiply fewer numbers where weights are zero.

vLLM had kernels for 2:4 up to 0.19 and has none since (its pull request 36799): 0.32 refuses a `sparsity_config` and
computes with zeros as with any other number (tests/contract holds that). NVIDIA's sparse tensor cores, from compute
capability 8.0 on, multiply 2:4; TensorRT and `torch.sparse.to_sparse_semi_structured` use them; neither is run here.
"""

VLLM = "vLLM 0.32 computes with zeros as with other numbers and gains nothing"
TENSOR_CORES = (
    "TensorRT and torch's to_sparse_semi_structured may gain on GPUs from compute capability 8.0 on (by their makers, "
    "not measured)"
)
NOBODY = "no other runtime that Lowbit writes for gains either"
OF_TENSOR_CORES = "2:4"


def gains(pattern: object) -> str:
    """For a person; `pattern` is 2:4, 4:8 or a ratio."""
    return f"{VLLM}; {TENSOR_CORES if str(pattern) == OF_TENSOR_CORES else NOBODY}"
