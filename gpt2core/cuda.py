"""The kernels of cuda.cu, compiled at run time by NVRTC, which every CUDA build of torch contains.

They need neither a compiler in the image nor the CUDA toolkit. If they cannot be compiled, or do not support the
model's shape, torch's operators compute the same. All are for decoding, except the one for the training loss.
"""

import ctypes
import logging
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.config import GPT2Config
from gpt2core.sampling import most_likely

logger = logging.getLogger(__name__)

HEAD_WIDTH = 64  # the only head width that the attention kernel supports
THREADS, MAX_THREADS, LINEAR_WARPS = 256, 1024, 4  # the same numbers as in cuda.cu
MAX_WIDTH = 8 * THREADS  # largest width of `add_norm`: PER_THREAD * THREADS
LINEAR_ROWS = (1, 2, 4)  # numbers of rows with a kernel
ONE_WARP = 1024  # a linear layer with more inputs uses all warps of a block per output; one warp loads these at once
MAX_LOGITS = 7 * 8 * MAX_THREADS  # of `cross_entropy`: VOCABULARY_LOADS * 8 * MAX_THREADS
NAMES = (
    "attend",
    "add_norm",
    "most_likely",
    "cross_entropy",
    *(f"{kind}linear_{n}" for n in LINEAR_ROWS for kind in ("", "split_")),
)
SOURCE = Path(__file__).with_name("cuda.cu")


def kernels_for(config: GPT2Config, dtype: torch.dtype, device: torch.device) -> "Kernels | None":
    """Return the kernels; None if the device, the dtype or the model's shape is not supported."""
    is_aligned = config.n_embd % 8 == 0 and config.mlp_width % 8 == 0
    suits = config.head_width == HEAD_WIDTH and is_aligned and config.n_embd <= MAX_WIDTH
    return _compiled(device) if suits and dtype == torch.bfloat16 and device.type == "cuda" else None


def loss_kernels_for(logits: Tensor) -> "Kernels | None":
    """Return the kernels for the loss of logits (N, n); None if their device, dtype or shape is not supported."""
    suits = logits.is_contiguous() and logits.shape[-1] % 8 == 0 and logits.shape[-1] <= MAX_LOGITS
    suits = suits and logits.dtype == torch.bfloat16 and logits.device.type == "cuda"
    return _compiled(logits.device) if suits and len(logits) else None


class Kernels:
    """Kernels as methods. Each launches one kernel on the current stream, and can be captured in a CUDA graph.

    Arguments must be contiguous.
    """

    def __init__(self, cubin: bytes, device: torch.device) -> None:
        """Load a compiled cuda.cu onto a device.

        Raises:
            OSError, RuntimeError: there is no CUDA driver, or it cannot load the kernels.
        """
        self._driver, self._device = ctypes.CDLL("libcuda.so.1"), device
        module = ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin))
        self._functions = {}
        for name in NAMES:
            self._functions[name] = ctypes.c_void_p()
            found = self._driver.cuModuleGetFunction(ctypes.byref(self._functions[name]), module, name.encode())
            self._check(found)

    def attend(self, qkv: Tensor, kv: Tensor, positions: Tensor, scale: float) -> Tensor:
        """Compute attention (B, H * D) of one new token per row, at its position (B), from qkv (B, 3, H, D).

        The token's key and value are stored in the cache kv (max_batch, 2, H, columns, D). Columns after its position
        are not read.
        """
        B, _, H, D = qkv.shape
        out = qkv.new_empty(B, H * D)
        self._launch("attend", (H, B), THREADS, out, kv, qkv, positions, H, kv.shape[3], scale)
        return out

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Add y (N, C), bf16, to x (N, C), fp32, in place; return layer_norm(x) (N, C) in bf16."""
        N, C = x.shape
        out = torch.empty_like(y)
        self._launch("add_norm", (N, 1), THREADS, out, x, y, weight, bias, C, eps)
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
        """Compute `F.linear` for x (N, in), where N is one of LINEAR_ROWS; with `gelu`, GELU (tanh) of the result."""
        N, (n_out, n_in) = len(x), weight.shape
        out = x.new_empty(N, n_out)
        name, blocks = f"linear_{N}", -(-n_out // LINEAR_WARPS)
        if n_in > ONE_WARP:
            name, blocks = f"split_{name}", n_out
        self._launch(name, (blocks, 1), 32 * LINEAR_WARPS, out, x, weight, bias, n_in, n_out, int(gelu))
        return out

    def most_likely(self, logits: Tensor) -> Tensor:
        """Compute `gpt2core.sampling.most_likely` for logits (N, n) in fp32."""
        N, n = logits.shape
        out = torch.empty(N, dtype=torch.long, device=logits.device)
        self._launch("most_likely", (N, 1), MAX_THREADS, out, logits, n)
        return out

    def cross_entropy_(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy (N), fp32, of logits (N, n) in bf16 and labels (N); it is 0 for negative labels.

        The logits are replaced by the gradients of their row's cross-entropy.
        """
        N, n = logits.shape
        losses = torch.empty(N, dtype=torch.float32, device=logits.device)
        self._launch("cross_entropy", (N, 1), MAX_THREADS, losses, logits, labels, n)
        return losses

    def _launch(self, name: str, grid: tuple[int, int], threads: int, *arguments: Tensor | int | float) -> None:
        values = [_as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self._call(name, grid, threads, pointers)

    def _call(self, name: str, grid: tuple[int, int], threads: int, pointers: "ctypes.Array[ctypes.c_void_p]") -> None:
        shared_bytes, launch = 0, self._driver.cuLaunchKernel
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            sizes = (*grid, 1, threads, 1, 1, shared_bytes)
            self._check(launch(self._functions[name], *sizes, stream, pointers, ctypes.c_void_p()))

    def _check(self, result: int) -> None:
        if result:
            message = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(message))
            raise RuntimeError(f"CUDA: {(message.value or b'unknown error').decode()}")


def _as_c(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


@cache
@torch.inference_mode()
def _compiled(device: torch.device) -> Kernels | None:
    """Compile the kernels for a device, and compare them with torch. If this fails, log a warning and return None."""
    try:
        major, minor = torch.cuda.get_device_capability(device)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes torch's context current, as the driver's calls require
            kernels = Kernels(compile_kernels(f"sm_{major}{minor}"), device)
            check(kernels, device)
        return kernels
    except Exception as error:  # torch's operators then compute the same
        reason = str(error).partition("\n")[0]
        logger.warning("no kernels for this GPU, computing with torch's operators, which is slower: %s", reason)
        return None


def check(kernels: Kernels, device: torch.device) -> None:
    """Compare the kernels with torch's operators on a device.

    Raises:
        AssertionError: a result differs.
    """
    with torch.autocast(device.type, enabled=False):  # mixed precision would change the results of torch's operators
        _check(kernels, device)


def _check(kernels: Kernels, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    def compare(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)  # bf16 has 8 bits

    qkv, kv, lengths = random(3, 3, 2, HEAD_WIDTH), random(3, 2, 2, 300, HEAD_WIDTH), [1, 40, 300]
    outputs = []
    for row, length in enumerate(lengths):
        kv[row, :, :, length - 1 :] = torch.nan  # the new token's column, and columns that must not be read
        keys, values = torch.cat([kv[row, :, :, : length - 1], qkv[row, 1:, :, None]], 2).float()
        q = qkv[row, 0, :, None].float()
        outputs.append(F.scaled_dot_product_attention(q, keys, values, scale=0.2).flatten())
    positions = torch.tensor([length - 1 for length in lengths], device=device)
    compare(kernels.attend(qkv, kv, positions, 0.2), torch.stack(outputs))
    stored = [kv[row, :, :, length - 1] for row, length in enumerate(lengths)]
    compare(torch.stack(stored), qkv[:, 1:].float())

    x, y, weight, bias = random(3, 776).float(), random(3, 776), random(776).float(), random(776).float()
    total = x + y
    compare(kernels.add_norm(x, y, weight, bias, 1e-5), F.layer_norm(total, (776,), weight, bias))
    compare(x, total)

    for n, n_in in product(LINEAR_ROWS, (776, 1288)):  # one warp, and all warps of a block per output
        inputs, matrix, own_bias = random(n, n_in), random(37, n_in) / 36, random(37)
        expected = F.linear(inputs.float(), matrix.float(), own_bias.float())
        compare(kernels.linear(inputs, matrix, own_bias), expected)
        compare(kernels.linear(inputs, matrix, own_bias, gelu=True), F.gelu(expected, approximate="tanh"))

    logits = random(3, 20_000).float()
    logits[0, 5], logits[1, 19_999], logits[2, 7] = 9, 9, torch.nan
    torch.testing.assert_close(kernels.most_likely(logits), most_likely(logits))

    with torch.inference_mode(False):
        scores, labels = random(3, 20_000).requires_grad_(), torch.tensor([7, -1, 19_999], device=device)
        losses = F.cross_entropy(scores.float(), labels, ignore_index=-1, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
    found = scores.detach().clone()
    compare(kernels.cross_entropy_(found, labels), losses.detach())
    torch.testing.assert_close(found, gradient, rtol=0.02, atol=1e-7)


def compile_kernels(architecture: str) -> bytes:
    """Compile cuda.cu for an architecture such as "sm_90", and return the machine code. This needs no GPU.

    Raises:
        OSError: there is no NVRTC of torch's CUDA version.
        RuntimeError: the code does not compile; the message has the compiler's output.
    """
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), b"cuda.cu", 0, None, None)
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"cuda.cu cannot be compiled for {architecture}: {log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:  # not on the loader's path: pip installs it next to torch
        files = [*Path(torch.__file__).parent.parent.glob(f"nvidia/*/lib/{name}")]
        if not files:
            raise
        return ctypes.CDLL(str(files[0]))
