"""Keys of foreign weight files."""

import pytest
import torch

from onestepsr.core.errors import UserError
from onestepsr.weights.files import canonical_keys


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_of_training_leave_no_trace(prefix: str) -> None:
    value = torch.zeros(1)
    assert canonical_keys({f"{prefix}out.0.weight": value}) == {"out.0.weight": value}


def test_weights_are_taken_from_under_state_dict() -> None:
    value = torch.zeros(1)
    assert canonical_keys({"iteration": 3, "state_dict": {"module.out.bias": value}}) == {"out.bias": value}


def test_modules_inside_a_network_keep_their_names() -> None:
    assert set(canonical_keys({"encoder.module.weight": 1, "modules.weight": 2})) == {
        "encoder.module.weight",
        "modules.weight",
    }


def test_two_networks_in_one_file_are_an_error() -> None:
    with pytest.raises(UserError, match="two networks in one"):
        canonical_keys({"module.weight": 1, "weight": 2})
