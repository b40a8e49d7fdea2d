"""CUDA graphs: what the host launches for a function, recorded once and started again by one call."""

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from runtime.devices import first_words

UNRECORDED = 2  # calls of a shape that run as they are: what is compiled or allocated for good at first can't be recorded


class Recorded:
    """A function of tensors on a card that is recorded as a CUDA graph, for each set of shapes that it is given, and replayed.

    function(*tensors) -> {name: tensor}; it may not wait for the device. What a replay returns is overwritten by the next
    one. `trained` are the weights whose gradients the function adds to: they are allocated before it is recorded, and while
    there are `graphs` they have to stay where they are (`zero_grad(set_to_none=False)`). A step of `paper` launches 14,000
    kernels, which takes a host longer than it takes the card to compute them. Without `enabled`, and where something can't be
    recorded, which is said in a line, it is the function itself.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], trained: Sequence[Tensor] = (), enabled: bool = True):
        self.function, self.trained, self.enabled = function, trained, enabled
        self.calls, self.graphs, self.pool = {}, {}, None

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        shapes = tuple(x.shape for x in inputs)
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if self.enabled and shapes not in self.graphs and self.calls[shapes] > UNRECORDED:
            self.record(shapes, inputs)
        if shapes not in self.graphs:
            self.forget()  # whose memory this call may need, and what a failed recording holds
            return self.function(*inputs)
        graph, places, results = self.graphs[shapes]
        torch._foreach_copy_(places, inputs)
        graph.replay()
        return results

    def record(self, shapes: tuple, inputs: tuple[Tensor, ...]) -> None:
        graph, places = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all graphs, of which one is replayed at a time
        without = [p for p in self.trained if p.grad is None]
        try:
            for p in without:
                p.grad = torch.zeros_like(p)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # the loader's thread goes on
                self.graphs[shapes] = graph, places, self.function(*places)
        except RuntimeError as error:  # of memory too: gradients that stay take more of it
            self.enabled = False
            print(f"this can't be recorded as a CUDA graph and goes on without one, slower ({first_words(error)})", flush=True)
            for p in without:
                p.grad = None

    def forget(self) -> None:
        """Give the graphs' memory back; the next call records anew."""
        if self.pool:
            self.graphs, self.pool = {}, None
            gc.collect()
            torch.cuda.empty_cache()
