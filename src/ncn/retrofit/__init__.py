"""A controller on a Hugging Face model that exists already, its own weights untouched:

    handle = ncn.attach(model, ncn.ControllerConfig())
    ...  # train as any model: only the controller's parameters require gradients
    handle.save("controller")
    handle.detach()  # the model is as it was

No module is replaced and no function patched. Precision acts through the library's attention interface; gain and gates
act in hooks; which modules they hook is one row in `families.py` for each architecture.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError:
    from ncn.errors import UserError

    raise UserError("transformers is not installed: pip install transformers accelerate") from None

from ncn.retrofit.attach import AttachedController, attach
from ncn.retrofit.families import FAMILIES, Family
from ncn.retrofit.loading import load_controller

__all__ = ["FAMILIES", "AttachedController", "Family", "attach", "load_controller"]
