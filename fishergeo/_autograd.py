"""One guard that the package's hand-written gradients share."""

import torch


def refuse_second_order(name: str) -> None:
    """Refuse a backward pass with create_graph=True through a function whose gradient is written by hand.

    torch's once_differentiable lets such a pass through when the incoming gradient is a constant, and would then take
    the outgoing one for a constant too: a silently wrong second derivative.

    Args:
        name: the public function, for the message.

    Raises:
        RuntimeError: always, inside a backward pass with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivatives: call backward without create_graph=True")
