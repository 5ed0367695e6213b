"""NCN models as transformers models: the same modules, the same weights, the same files.

Importing this package makes the Auto classes know the model type "ncn"; they do not before:

    import ncn.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)  # from training, `ncn.save_model` or `save_pretrained`
    tokenizer = AutoTokenizer.from_pretrained(folder)

What `save_pretrained` writes, `ncn.load` reads.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError:
    from ncn.errors import UserError

    raise UserError("transformers is not installed: pip install transformers accelerate") from None

from ncn.hf.model import NCNConfigForTransformers, NCNForCausalLM, NCNOutput

__all__ = ["NCNConfigForTransformers", "NCNForCausalLM", "NCNOutput"]
