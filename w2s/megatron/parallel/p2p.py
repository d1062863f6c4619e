"""Messages between the stages of a pipeline, kept until they are sent.

Where messages overlap with work, Megatron-Core frees an output that is still under way, and never waits for the last
message of forward passes alone. Gloo reads memory that is freed then, and drops a message that nobody holds any more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed import Work

from w2s.megatron.compat import messages_through


@contextmanager
def keep_until_sent() -> Iterator[None]:
    """Inside, what is sent keeps its memory until it is sent; at the end all of it is."""
    sent = list[Work]()

    def keeping(post: Callable[..., dict[str, Work]]) -> Callable[..., dict[str, Work]]:
        def post_and_keep(*, tensor_send_prev: Tensor | None, tensor_send_next: Tensor | None, **others: Any) -> Any:
            sent[:] = [work for work in sent if not work.is_completed()]
            # Megatron takes the memory from its own tensors.
            detached = [None if tensor is None else tensor.detach() for tensor in (tensor_send_prev, tensor_send_next)]
            works = post(tensor_send_prev=detached[0], tensor_send_next=detached[1], **others)
            sent.extend(work for name, work in works.items() if name.startswith("send"))
            return works

        return post_and_keep

    with messages_through(keeping):
        yield
    for work in sent:
        if not work.is_completed():
            work.wait()
