"""How fast a GPU is: its ceilings, and our kernels against PyTorch's own backends."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cuda_device import cuda


def time_cuda(torch: Any, function: Callable[[], Any], launches: int) -> float:
    """Seconds of one call, from events around `launches` of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(launches):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / launches


def stage_ceilings(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Copy bandwidth (bytes read and written) and the bf16 matrix product on random data."""
    torch = memory.torch
    source = torch.randn(1 << 30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = statistics.median(time_cuda(torch, partial(target.copy_, source), 5) for _ in range(5))
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    time_cuda(torch, partial(torch.matmul, a, b), 3)
    product = statistics.median(time_cuda(torch, partial(torch.matmul, a, b), 10) for _ in range(5))
    result = {"copy_gb_s": 2 * 4 * (1 << 30) / copy / 1e9, "gemm_tflop_s": 2 * 8192**3 / product / 1e12}
    print(f"ceilings: copy {result['copy_gb_s']:.0f} GB/s, 8192^3 bf16 {result['gemm_tflop_s']:.0f} TFLOP/s")
    return result


class TorchForward:
    """Our forward on torch CUDA tensors, outputs and workspace allocated once."""

    def __init__(self, library: Any, q: Any, k: Any, v: Any, causal: bool, variant: int = -1) -> None:
        import torch

        self.library, self.variant, self.keep = library, variant, (q, k, v)
        self.out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=q.dtype)
        p = self.problem = cuda.Problem()
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", self.out)):
            dtype = str(tensor.dtype).removeprefix("torch.")
            setattr(p, name, cuda.view(tensor.data_ptr(), dtype, tensor.shape, tensor.stride()))
        p.causal = causal
        nbytes = library.workspace_nbytes(p, variant=variant)
        self.workspace = torch.empty(max(nbytes, 1), device=q.device, dtype=torch.uint8)
        self.torch = torch

    def __call__(self) -> Any:
        """Launch once."""
        self.library.forward(
            self.problem,
            stream=self.torch.cuda.current_stream().cuda_stream,
            workspace=self.workspace.data_ptr(),
            workspace_nbytes=self.workspace.numel(),
            variant=self.variant,
        )
        return self.out


class TorchBackward:
    """Our backward on torch CUDA tensors, after one forward; everything allocated once."""

    def __init__(self, library: Any, q: Any, k: Any, v: Any, dout: Any, causal: bool, variant: int = -1) -> None:
        forward = TorchForward(library, q, k, v, causal)
        self.variant = variant
        torch, self.forward = forward.torch, forward
        lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
        forward.problem.lse = cuda.view(lse.data_ptr(), "float32", lse.shape, lse.stride())
        forward()
        self.gradients = [torch.empty_like(x) for x in (q, k, v)]
        self.given = cuda.Gradients()
        for name, tensor in zip(("dout", "dq", "dk", "dv"), (dout, *self.gradients), strict=True):
            dtype = str(tensor.dtype).removeprefix("torch.")
            setattr(self.given, name, cuda.view(tensor.data_ptr(), dtype, tensor.shape, tensor.stride()))
        nbytes = library.workspace_nbytes(forward.problem, gradients=self.given)
        self.workspace = torch.empty(nbytes, device=q.device, dtype=torch.uint8)
        self.keep = (lse, dout)

    def __call__(self) -> Any:
        """Launch once."""
        self.forward.library.backward(
            self.forward.problem,
            self.given,
            stream=self.forward.torch.cuda.current_stream().cuda_stream,
            workspace=self.workspace.data_ptr(),
            workspace_nbytes=self.workspace.numel(),
            variant=self.variant,
        )
        return self.gradients


def speed_shapes() -> list[tuple[int, int, int, int, bool]]:
    """(batch, heads, length, head_dim, causal) with batch * length = 16k and heads * head_dim = 2048."""
    return [
        (16384 // s, 2048 // d, s, d, causal)
        for d in (64, 128)
        for s in (512, 2048, 4096, 16384)
        for causal in (False, True)
    ]


def flop(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> float:
    return 4.0 * batch * heads * seqlen * seqlen * head_dim * (0.5 if causal else 1.0)


def peers(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Callable[[], Any]]:
    """PyTorch's backends that accept this problem."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def run_peer(backend: Any) -> Any:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    found = {}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        call = partial(run_peer, getattr(SDPBackend, name))
        try:
            call()
            found[name.split("_")[0]] = call
        except RuntimeError as error:
            print(f"  {name} does not take this problem: {str(error).splitlines()[0]}")
    return found


def times_in_turn(
    torch: Any, candidates: dict[str, Callable[[], Any]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds a call of each candidate, round by round, after a few to warm up."""
    for call in candidates.values():
        time_cuda(torch, call, 3)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, call in candidates.items():
            times[name].append(time_cuda(torch, call, args.launches))
    return times


def stage_ratios(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Median ratio of ours to each peer's rate; every output is compared with cuDNN's before it is timed."""
    torch = memory.torch
    rows = []
    for batch, heads, seqlen, head_dim, causal in speed_shapes():
        if time.monotonic() > deadline:
            print("  cut short by time")
            break
        q, k, v = (torch.randn(batch, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        ours = TorchForward(library, q, k, v, causal)
        candidates = {"ours": ours, **peers(torch, q, k, v, causal)}
        wanted = next(call for name, call in candidates.items() if name != "ours")().float()
        difference = float((ours().float() - wanted).norm() / wanted.norm())
        assert difference < 8e-3, f"ours differs from the peer by {difference}"
        times = times_in_turn(torch, candidates, args)
        work = flop(batch, heads, seqlen, head_dim, causal) / 1e12
        row: dict[str, Any] = {"batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim, "causal": causal}
        for name, samples in times.items():
            row[name] = work / statistics.median(samples)
            if name != "ours":
                ratios = [peer / own for peer, own in zip(samples, times["ours"], strict=True)]
                row["ratio_" + name] = [min(ratios), statistics.median(ratios), max(ratios)]
        rows.append(row)
        text = "  ".join(
            f"{n} {row[n]:.0f}" + (f" (x{row['ratio_' + n][1]:.2f})" if n != "ours" else "") for n in times
        )
        print(f"  d{head_dim} s{seqlen} {'causal' if causal else 'full  '} TFLOP/s: {text}")
    return {"rows": rows}


def stage_gradients(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Median rates of the backward pass alone, five products counted, ours and each peer's that has one."""
    torch = memory.torch
    rows = []
    for batch, heads, seqlen, head_dim, causal in speed_shapes():
        if time.monotonic() > deadline:
            print("  cut short by time")
            break
        q, k, v, dout = (
            torch.randn(batch, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
            for i in range(4)
        )
        ours = TorchBackward(library, q.detach(), k.detach(), v.detach(), dout, causal)
        candidates: dict[str, Callable[[], Any]] = {"ours": ours}
        for name, call in peers(torch, q, k, v, causal).items():
            candidates[name] = partial(torch.autograd.grad, call(), (q, k, v), dout, retain_graph=True)
        wanted = next(call for name, call in candidates.items() if name != "ours")()
        for mine, theirs in zip(ours(), wanted, strict=True):
            difference = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
            assert difference < 1e-2, f"ours differs from the peer by {difference}"
        times = times_in_turn(torch, candidates, args)
        work = 2.5 * flop(batch, heads, seqlen, head_dim, causal) / 1e12
        row: dict[str, Any] = {"batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim, "causal": causal}
        row |= {name: work / statistics.median(samples) for name, samples in times.items()}
        rows.append(row)
        text = "  ".join(
            f"{n} {row[n]:.0f}" + (f" (x{row['ours'] / row[n]:.2f})" if n != "ours" else "") for n in times
        )
        print(f"  d{head_dim} s{seqlen} {'causal' if causal else 'full  '} backward TFLOP/s: {text}")
    return {"rows": rows}


def stage_decode(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Bytes of K and V read per second, graphs replayed over caches that together pass L2 many times."""
    torch = memory.torch
    rows = []
    for batch, heads, kv_heads, seqlen_kv, head_dim in (
        (1, 32, 8, 131072, 128),
        (8, 32, 8, 32768, 128),
        (64, 32, 8, 4096, 128),
        (16, 32, 32, 4096, 64),
        (64, 64, 8, 8192, 64),
    ):
        if time.monotonic() > deadline:
            print("  cut short by time")
            break
        nbytes = 2 * 2 * batch * kv_heads * seqlen_kv * head_dim
        copies = max(2, -(-(1 << 30) // nbytes))
        q = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
        caches = [
            [torch.randn(batch, kv_heads, seqlen_kv, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(copies)
        ]
        ours = [TorchForward(library, q, k, v, causal=False) for k, v in caches]
        calls: dict[str, list[Callable[[], Any]]] = {"ours": list(ours)}
        for k, v in caches:
            for name, call in peers(torch, q, k, v, False).items():
                calls.setdefault(name, []).append(call)
        graphs = {}
        for name, functions in calls.items():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for function in functions:
                    function()
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                for function in functions:
                    function()
        row = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seqlen_kv": seqlen_kv, "head_dim": head_dim}
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(args.rounds):
            for name, graph in graphs.items():
                samples[name].append(time_cuda(torch, graph.replay, 3) / copies)
        for name, times in samples.items():
            row[name] = nbytes / statistics.median(times) / 1e9
        rows.append(row)
        print(
            f"  b{batch} h{heads}/{kv_heads} kv{seqlen_kv} d{head_dim} GB/s: "
            + "  ".join(f"{n} {row[n]:.0f}" for n in samples)
        )
    return {"rows": rows}


def stage_sweep(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rates of every forward kernel without policies, and of the backward pass with every kernel of its launches."""
    torch = memory.torch
    rows = []
    kernels = {64: (0, 1, 80, 83, 90, 93), 128: (2, 3, 4, 81, 84, 91, 94), 256: (5, 6, 82, 92)}
    for head_dim, variants in kernels.items():
        for causal in (False, True):
            q, k, v, dout = (
                torch.randn(4, 2048 // head_dim, 4096, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
            )
            calls: dict[int, Callable[[], Any]] = {}
            for variant in variants:
                if variant < 80:
                    calls[variant] = TorchForward(library, q, k, v, causal, variant)
                else:
                    calls[variant] = TorchBackward(library, q, k, v, dout, causal, variant)
            for call in calls.values():
                time_cuda(torch, call, 3)
            for variant, call in calls.items():
                seconds = statistics.median(time_cuda(torch, call, args.launches) for _ in range(args.rounds))
                work = flop(4, 2048 // head_dim, 4096, head_dim, causal) * (1.0 if variant < 80 else 2.5)
                rate = work / seconds / 1e12
                rows.append({"head_dim": head_dim, "causal": causal, "variant": variant, "tflop_s": rate})
                print(f"  d{head_dim} {'causal' if causal else 'full  '} variant {variant}: {rate:.0f} TFLOP/s")
    return {"rows": rows}
