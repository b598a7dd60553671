"""What a process holds that it does not need."""

import subprocess
import sys


def test_quantize_is_imported_without_torch_s_compiler() -> None:
    program = "import sys, lowbit_quantize.pipeline; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
