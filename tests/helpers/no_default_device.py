"""Which device tensors are made on: a mode that fails where nobody said it."""

import torch

FACTORIES = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace,
    torch.logspace, torch.ones, torch.rand, torch.randint, torch.randn, torch.tensor, torch.zeros,
}  # fmt: skip


class NoDefaultDevice(torch.overrides.TorchFunctionMode):
    """Fails where a tensor is made without saying on which device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FACTORIES:
            assert (kwargs or {}).get("device") is not None, f"{func.__name__} without a device"
        return func(*args, **kwargs or {})
