"""The choice of a token: what is drawn is what the distribution says, and depends on nothing else."""

import math

import numpy as np
import pytest
import torch

from ncn.errors import UserError
from ncn.inference.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def drawn(count: int, logits: torch.Tensor = LOGITS, **settings: float | int | None) -> torch.Tensor:
    rows = [Sampling(seed=3, choice=choice, **settings) for choice in range(count)]
    return Sampler(rows, logits.device)(logits.expand(count, -1), [7] * count)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_come_as_often_as_their_probability_says(temperature: float) -> None:
    share = torch.bincount(drawn(20_000, temperature=temperature), minlength=5) / 20_000
    torch.testing.assert_close(share, (LOGITS / temperature).softmax(-1), rtol=0, atol=0.015)


def test_only_the_likeliest_are_drawn() -> None:
    assert set(drawn(2000, top_k=2).tolist()) == {1, 4}
    assert set(drawn(2000, top_k=9).tolist()) == set(range(5))
    probabilities = LOGITS.softmax(-1)  # 0.46, 0.28, 0.17, 0.06, 0.02
    assert set(drawn(4000, top_p=float(probabilities[1]) - 0.01).tolist()) == {1}
    assert set(drawn(4000, top_p=float(probabilities[1]) + 0.01).tolist()) == {1, 4}
    assert set(drawn(4000, top_p=1.0).tolist()) == set(range(5))
    # of the two likeliest, the first has 0.62 of what is left
    assert set(drawn(2000, top_k=2, top_p=0.5).tolist()) == {1}


def test_no_temperature_is_too_low_and_none_takes_the_likeliest() -> None:
    assert set(drawn(50, temperature=1e-300).tolist()) == {1}
    assert set(drawn(50, temperature=0.0).tolist()) == {1}


def test_a_number_is_a_function_of_seed_choice_and_position() -> None:
    numbers = {
        (seed, choice, position): Sampling(seed=seed, choice=choice).uniform(position)
        for seed in (0, 1, 10**40)
        for choice in (0, 1, 11)
        for position in (0, 1, 11)
    }
    assert len(set(numbers.values())) == len(numbers)
    assert all(0 <= number < 1 for number in numbers.values())
    assert Sampling(seed=1, choice=11).uniform(1) == numbers[1, 11, 1]
    many = np.array([Sampling(seed=5).uniform(position) for position in range(4000)])
    assert abs(many.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 4 / math.sqrt(4000)


def test_without_a_seed_texts_differ() -> None:
    assert Sampling().uniform(0) != Sampling().uniform(0)


def test_a_row_is_drawn_as_it_is_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 50, generator=generator)
    samplings = [
        Sampling(0.0),
        Sampling(0.7, seed=1),
        Sampling(1.3, top_k=3, seed=1),
        Sampling(1.0, top_p=0.6, seed=2),
        Sampling(2.0, top_k=10, top_p=0.9, seed=2, choice=4),
        Sampling(1.0, top_k=50, seed=9),
    ]
    for position in range(40):
        together = Sampler(samplings, logits.device)(logits, [position + row for row in range(6)])
        alone = [Sampler([samplings[row]], logits.device)(logits[row : row + 1], [position + row]) for row in range(6)]
        assert together.tolist() == torch.cat(alone).tolist()


def test_a_number_that_is_nearly_1_draws_a_token_that_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampling, "uniform", lambda self, position: 1 - 2.0**-48)
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, :3] = torch.tensor([0.0, 1.0, 0.3])
    assert Sampler([Sampling(seed=1)], logits.device)(logits, [0]).tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, not -1"),
        ({"temperature": math.nan}, "temperature must be 0 or more, not nan"),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], not 0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], not 1.5"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sampling(**settings)
