"""Rows of decoders to compare: the grammar of a specification, its errors, and what a row decodes."""

from __future__ import annotations

import pytest
import torch

from ssdd.engine.errors import UserError
from ssdd.model.compared_decoders import open_rows

CPU = torch.device("cpu")


def test_a_row_decodes_as_the_saved_tokenizer_does_and_is_frozen(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "student")
    (row,) = open_rows([f"student:{tmp_path / 'student'}:1"], tmp_path, CPU)
    assert (row.name, row.steps) == ("student", 1)
    assert not row.tokenizer.training and not any(p.requires_grad for p in row.tokenizer.parameters())
    z, noise = torch.randn(1, 2, 2, 2), torch.randn(1, 3, 16, 16)
    assert torch.equal(row.tokenizer.decode(z, row.steps, noise), tokenizer.decode(z, 1, noise))


def test_a_reference_may_contain_colons(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "run:2")
    (row,) = open_rows([f"a:{tmp_path / 'run:2'}:12"], tmp_path, CPU)
    assert (row.name, row.steps) == ("a", 12)


def test_no_specification_gives_no_row(tmp_path):
    assert open_rows([], tmp_path, CPU) == []


@pytest.mark.parametrize(
    "wrong", ["", "a", "a:b", "a:b:", "a::1", ":b:1", "a:b:0", "a:b:-1", "a:b:1.5", "a:b:one", "a:b: 1", "a:b:²"]
)
def test_a_malformed_specification_is_quoted_beside_the_grammar(tmp_path, wrong):
    with pytest.raises(UserError, match="expected name:checkpoint reference:steps") as error:
        open_rows([wrong], tmp_path, CPU)
    assert repr(wrong) in str(error.value)


def test_a_reference_without_weights_is_an_error_of_the_user(tmp_path):
    with pytest.raises(UserError, match="never_trained"):
        open_rows(["a:never_trained:1"], tmp_path, CPU)
