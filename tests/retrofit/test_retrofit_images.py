"""A controller on a model that also reads images: Gemma 3, whose language model is a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ncn
from ncn.retrofit.loading import build_retrofitted
from ncn.retrofit.recipe import retrofit_recipe
from retrofits import base, ids, wake

pytestmark = pytest.mark.xdist_group("transformers")
IMAGE = 95
"""The token that stands for a part of an image; an image has four of them."""


def test_what_reads_the_images_is_left_alone() -> None:
    model = base("gemma3")
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero where it is new
    text = ids(rows=1).clamp(max=90)
    text[:, 2:6] = IMAGE
    seen = {
        "input_ids": text,
        "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)),
        "token_type_ids": (text == IMAGE).long(),
        "use_cache": False,
    }
    with torch.no_grad():
        before = model(**seen).logits
        other = model(**seen | {"pixel_values": -seen["pixel_values"]}).logits  # type: ignore[operator]
    assert not torch.equal(before, other)
    handle = ncn.attach(model)
    vision = model.config.vision_config
    assert (vision._attn_implementation, handle.decoder.config._attn_implementation) == ("sdpa", "ncn_sdpa")
    with torch.no_grad():
        assert torch.equal(model(**seen).logits, before)
        wake(handle)
        assert not torch.allclose(model(**seen).logits, before)
    handle.detach()
    with torch.no_grad():
        assert torch.equal(model(**seen).logits, before)


def test_trained_saved_and_loaded_it_is_a_base_like_any_other(tmp_path: Path) -> None:
    plain = base("gemma3")
    plain.save_pretrained(tmp_path / "base")
    recipe = retrofit_recipe(tmp_path / "base", ["controller.width=8", "controller.hidden=8"])
    assert (recipe.model.num_layers, recipe.model.vocab_size, recipe.train.context) == (3, 96, 128)
    model = build_retrofitted(recipe, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, plain(input_ids=ids()).logits, rtol=0, atol=1e-5)
        wake(model.handle)
        awake = model(ids()).logits
    model.handle.save(tmp_path / "controller")
    ncn.load_controller(plain, tmp_path / "controller")
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids(), use_cache=False).logits, awake, rtol=0, atol=1e-5)
    ncn.load_controller(base("gemma3", dtype=torch.bfloat16), tmp_path / "controller")  # the same base, rounded
