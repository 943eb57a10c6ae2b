"""The paired discriminative term: its value and gradient, who stands against whom, and what training with it does."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medsd.config import FinetuneUNetConfig
from medsd.data.dataset import DataInfo
from medsd.data.hypotheses import Hypotheses, count_hypotheses
from medsd.errors import InputError
from medsd.objectives.discriminative import DECAY, SHARPNESS, NoContrast, PairedContrast
from medsd.training import prompts as prompts_of_rows
from medsd.training.prompts import PromptTable, rival_prompts
from recipes import finetune_unet

ERRORS = torch.tensor([[0.30, 0.40], [0.50, 0.20], [0.7, 0.1]])
"""Of three images under two prompts."""
PROMPTS, TIMESTEPS = torch.tensor([0, 0, 2]), torch.tensor([10, 900, 500])
"""The third image's prompt, number 2, is the empty one."""


def contrast_of(weight=0.5):
    return PairedContrast(weight, torch.tensor([[1], [0], [-1]]), steps=1000)


def test_the_term_is_a_logistic_loss_of_the_difference():
    errors = ERRORS.clone().requires_grad_(True)

    def error_of(condition):
        return errors[torch.arange(3), condition.clamp(max=1)]

    own = errors[torch.arange(3), torch.tensor([0, 0, 0])]
    contrast = contrast_of()
    # Image 0 is explained better by its own prompt, image 1 by its rival, image 2 has no rival. Each is alone in its stretch of
    # timesteps, so that its difference is plus or minus one RMS.
    terms = contrast(error_of, own, PROMPTS, TIMESTEPS, torch.Generator().manual_seed(0))
    expected = 0.5 * F.softplus(torch.tensor([-SHARPNESS, SHARPNESS]))
    torch.testing.assert_close(terms, torch.cat([expected, torch.zeros(1)]))
    terms.sum().backward()
    assert errors.grad[0, 0] > 0 > errors.grad[0, 1] and errors.grad[1, 0] > 0 > errors.grad[1, 1]
    assert abs(errors.grad[1, 0]) / 0.3**-1 > abs(errors.grad[0, 0]) / 0.1**-1, "what is told wrongly pulls harder"
    assert not errors.grad[2].any()


def test_the_scale_follows_the_differences():
    """The same term whatever the unit of the error, and a memory of about 1 / (1 - decay) differences."""
    terms = []
    for unit in (1.0, 1e-4):
        contrast = contrast_of()
        for _ in range(5):
            own = unit * ERRORS[:, 0]
            term = contrast(
                lambda condition, unit=unit: unit * ERRORS[torch.arange(3), condition.clamp(max=1)],
                own,
                PROMPTS,
                TIMESTEPS,
                torch.Generator(),
            )
        terms.append(term.sum().item())
    assert terms[0] == pytest.approx(terms[1], rel=1e-4)
    assert contrast.memory["contrast"][:, 1].max() == pytest.approx(1 - DECAY**5, rel=1e-3)


def test_a_difference_that_overflowed_is_not_learnt():
    contrast = contrast_of()
    contrast(lambda condition: torch.full((3,), torch.inf), ERRORS[:, 0], PROMPTS, TIMESTEPS, torch.Generator())
    assert not contrast.memory["contrast"].any()


def test_nothing_costs_nothing():
    def never(condition):
        raise AssertionError("no error is asked for")

    assert not NoContrast()(never, ERRORS[:, 0], PROMPTS, TIMESTEPS, torch.Generator()).any()


@pytest.mark.parametrize(("classes", "known"), [(0, "none"), (1, "one")])
def test_data_of_fewer_than_two_classes_is_refused_in_one_line(phantom_data, tmp_path, monkeypatch, classes, known):
    data = shutil.copytree(phantom_data, tmp_path / "data")
    record = json.loads((data / "medsd.json").read_text())
    changed = record | {name: record[name][:classes] for name in ("class_names", "prompts", "class_tokens")}
    (data / "medsd.json").write_text(json.dumps(changed))
    monkeypatch.setattr(prompts_of_rows, "row_labels", lambda rows: np.zeros(len(rows), int))
    with pytest.raises(InputError, match=f"--discriminative_weight compares classes, and this data has {known}"):
        finetune_unet.main(FinetuneUNetConfig(dataset_name=str(data), output_dir=str(tmp_path / "unet"), discriminative_weight=0.1))


def info(multi_label):
    names = ["bleed", "fracture"]
    tokens = ["<bleed>", "<fracture>"]
    return DataInfo(names, [f"a CT with {token}" for token in tokens], tokens, {}, 64, "pad", 1, "HU", "", multi_label)


def test_rivals_of_classes_keep_the_facts_of_the_image(monkeypatch):
    data, labels = info(False), np.array([0, 0, 1])
    monkeypatch.setattr(prompts_of_rows, "row_labels", lambda rows: labels)
    facts = "a CT with <bleed>, 60-69 years"
    table = PromptTable([*data.prompts, facts, ""], np.array([0, 2, 1]))
    changed, rivals = rival_prompts(None, table, data, count_hypotheses(labels, 2))
    place = changed.prompts.index
    assert [changed.prompts[number] for number in changed.numbers] == [data.prompts[0], facts, data.prompts[1]]
    assert rivals[place(facts)].tolist() == [place("a CT with <fracture>, 60-69 years")]
    assert rivals[place(data.prompts[0])].tolist() == [place(data.prompts[1])]
    assert rivals[place("")].tolist() == [-1] and changed.prompts[-1] == ""
    assert rivals[place("a CT with <fracture>, 60-69 years")].tolist() == [-1], "no image has that prompt"


def test_rivals_of_findings_are_the_other_sets(monkeypatch):
    data, labels = info(True), np.array([[1, 1], [0, 0], [1, 0]])
    monkeypatch.setattr(prompts_of_rows, "row_labels", lambda rows: labels)
    texts = ["a CT with <bleed> and <fracture>", "a CT with no finding", "a CT with <bleed>"]
    table = PromptTable([*data.prompts, *texts[:2], ""], np.array([2, 3, 0]))
    changed, rivals = rival_prompts(None, table, data, count_hypotheses(labels, 2))
    for text in texts:
        others = {changed.prompts[number] for number in rivals[changed.prompts.index(text)]}
        assert others == set(texts) - {text}


def test_hypotheses_are_the_frequent_sets_and_the_rare_are_counted():
    generator = np.random.default_rng(0)
    labels = (generator.random((4000, 8)) < 0.3).astype(int)
    found = count_hypotheses(labels, 8)
    assert len(found.sets) == 32 and sum(found.counts) + found.pooled == 4000 and found.pooled > 0
    numbers = found.numbers(labels)
    assert (numbers == -1).sum() == found.pooled and np.bincount(numbers[numbers >= 0]).tolist() == list(found.counts)
    np.testing.assert_array_equal(found.membership(8)[numbers[0]] if numbers[0] >= 0 else labels[0], labels[0])
    assert found.prior().sum() == pytest.approx(1) and Hypotheses.from_dict(json.loads(json.dumps(found.__dict__))) == found


def test_every_finding_is_in_a_set_where_there_is_room():
    generator = np.random.default_rng(0)
    labels = np.append((generator.random((4000, 8)) < 0.3).astype(int), np.zeros((4000, 1), int), 1)
    labels[:3, 8] = 1
    found = count_hypotheses(labels, 9)
    assert len(found.sets) == 32 and found.missing(9) == [] and sum(found.counts) + found.pooled == 4000
    assert sum(8 in members for members in found.sets) == 1
    labels[:, 8] = 0
    assert count_hypotheses(labels, 9).missing(9) == [8]


def test_training_with_the_term_resumes_to_the_same_weights(phantom_data, tmp_path):
    flags = {
        "dataset_name": str(phantom_data),
        "discriminative_weight": 0.1,
        "train_batch_size": 4,
        "validation_steps": 0,
        "logging_steps": 1,
    }

    def losses(name, **changes):
        finetune_unet.main(FinetuneUNetConfig(output_dir=str(tmp_path / name), **(flags | changes)))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines]

    whole = losses("whole", max_train_steps=4, lr_scheduler="constant")
    losses("parts", max_train_steps=2, lr_scheduler="constant")
    assert losses("parts", max_train_steps=4, lr_scheduler="constant", resume_from_checkpoint="latest") == whole
    assert losses("plain", max_train_steps=1, discriminative_weight=0.0)[0] < whole[0]


@pytest.mark.parametrize("other", ["unconditional", "learned_variance"])
def test_refusals(other):
    with pytest.raises(InputError, match="--discriminative_weight"):
        FinetuneUNetConfig(discriminative_weight=0.1, **{other: True})
