"""What --dry-run says of a run on the devices at hand."""

import pytest

from dit_jax.planning.plan import describe_plan


@pytest.fixture
def activations(tiny, tmp_path):
    """(compute options) -> the line on activations."""

    def line(**compute):
        plan = describe_plan(
            tiny.config(compute=compute, data={"dir": str(tmp_path)}, train={"batch_size": 800})
        )
        (found,) = (line for line in plan.splitlines() if "activations of 100 images" in line)
        return found

    return line


def test_auto_is_the_attention_of_the_machine(activations):
    assert activations() == activations(attention="einsum") != activations(attention="tokens_last")


def test_remat_and_precision_save_activations(activations):
    kept = [
        float(activations(**compute).split()[0])
        for compute in ({}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "remat": "full"})
    ]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[1] > kept[2]
