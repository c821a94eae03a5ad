# SPDX-License-Identifier: Apache-2.0
"""`AnswerMarker` against an oracle that decodes the text of every completion after every token."""

from __future__ import annotations

import copy

import pytest
import torch
from reference.tiny import small_tokenizer, text_of
from transformers.m3po.generation.marker import AnswerMarker

CPU = torch.device("cpu")


def latch_of(tokenizer, marker, rows):
    """What the matcher says after each token: (B, T)."""
    ids = torch.tensor(rows)
    matcher = AnswerMarker(tokenizer, marker, len(ids), CPU)
    return torch.stack([matcher.update(ids[:, : t + 1]) for t in range(ids.shape[1])], dim=1)


def oracle_of(tokenizer, marker, rows):
    """The same by decoding every prefix."""
    return torch.tensor([[marker in text_of(tokenizer, row[: t + 1]) for t in range(len(row))] for row in rows])


def assert_same(tokenizer, marker, rows):
    found, expected = latch_of(tokenizer, marker, rows), oracle_of(tokenizer, marker, rows)
    wrong = (found != expected).nonzero().tolist()
    assert not wrong, [(text_of(tokenizer, rows[b][: t + 1]), bool(found[b, t])) for b, t in wrong[:3]]
    return expected


def random_rows(special, vocabulary, count, length, share, seed=0):
    """Random token rows in which about `share` of the tokens come from `special`."""
    g = torch.Generator().manual_seed(seed)
    special = torch.tensor(special)
    from_special = special[torch.randint(len(special), (count, length), generator=g)]
    others = torch.randint(vocabulary, (count, length), generator=g)
    return torch.where(torch.rand(count, length, generator=g) < share, from_special, others).tolist()


def tokens_with(tokenizer, text):
    return [i for token, i in tokenizer.get_vocab().items() if text in token]


def test_random_completions_of_the_real_vocabulary_agree_with_the_decoded_text(smollm2_tokenizer):
    hashes = tokens_with(smollm2_tokenizer, "#")
    assert len(hashes) > 20
    rows = random_rows(hashes, len(smollm2_tokenizer), count=400, length=16, share=0.35)
    expected = assert_same(smollm2_tokenizer, "####", rows)
    assert expected[:, -1].any() and not expected[:, -1].all(), "the rows do not cover both outcomes"


def test_random_completions_of_the_small_vocabulary_agree_with_the_decoded_text():
    tokenizer = small_tokenizer()
    rows = random_rows(tokens_with(tokenizer, "#"), 256, count=400, length=16, share=0.35, seed=1)
    expected = assert_same(tokenizer, "####", rows)
    assert expected[:, -1].any() and not expected[:, -1].all()


@pytest.mark.parametrize(
    "pieces",
    [
        ["####"],
        ["##", "##"],
        ["#", "#", "#", "#"],
        ["###", "#"],
        ["Ġ####"],
        ["Ċ", "####", "Ġ", "5"],
        ["Ċ", "##", "##", "5"],
        ["Ġ", "#", "###", "Ċ"],
        ["##", "Ġ", "##"],
        ["###", "Ċ", "#"],
        ["##", "<|im_end|>", "##"],
        ["####", "<|im_end|>"],
        ["########"],
        ["####", "1", "####", "2"],
    ],
)
def test_the_marker_is_found_wherever_the_token_borders_lie(smollm2_tokenizer, pieces):
    unk = smollm2_tokenizer.unk_token_id
    ids = smollm2_tokenizer.convert_tokens_to_ids(["The", "Ġanswer", *pieces, "Ġis", "Ġdone"])
    known = set(smollm2_tokenizer.get_vocab())
    assert all(piece in known for piece in pieces) and ids.count(unk) <= pieces.count("<|endoftext|>"), pieces
    expected = assert_same(smollm2_tokenizer, "####", [ids])
    assert expected[0, -1] == ("####" in "".join(pieces))


def test_the_latch_stays_when_the_marker_is_long_past(smollm2_tokenizer):
    ids = smollm2_tokenizer.convert_tokens_to_ids(["Ġa", "##", "##", *["Ġb"] * 40])
    assert latch_of(smollm2_tokenizer, "####", [ids])[0].tolist() == [False, False] + [True] * 41


def test_rows_are_latched_one_by_one():
    tokenizer = small_tokenizer()
    rows = [tokenizer.convert_tokens_to_ids(row) for row in (["a", "####", "b"], ["##", "b", "##"], ["a", "##", "##"])]
    assert latch_of(tokenizer, "####", rows).tolist() == [[False, True, True], [False] * 3, [False, False, True]]


@pytest.mark.parametrize("marker", ["答案:", "→ß", "</think>", "A"])
def test_markers_of_several_bytes_match_across_tokens_that_split_a_character(smollm2_tokenizer, marker):
    pieces = smollm2_tokenizer(marker * 2 + " " + marker, add_special_tokens=False)["input_ids"]
    byte_tokens = smollm2_tokenizer.convert_tokens_to_ids(byte_characters(marker))
    special = sorted({*pieces, *byte_tokens} - {smollm2_tokenizer.unk_token_id})
    rows = random_rows(special, len(smollm2_tokenizer), count=300, length=24, share=0.9, seed=2)
    spelled = [row[:8] + byte_tokens + row[8 : 24 - len(byte_tokens)] for row in rows[:50]]
    expected = assert_same(smollm2_tokenizer, marker, rows + spelled)
    assert expected[-50:, -1].all() and not expected[:, 0].all()


def test_a_marker_that_is_one_token_ends_thinking_where_its_letters_do_too(smollm2_tokenizer):
    """`</think>` as in Qwen3: an added token that is none of the special ones, which a text may also spell."""
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    assert tokenizer.add_tokens(["<think>", "</think>"]) == 2
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert tokenizer("a</think>", add_special_tokens=False)["input_ids"][-1] == end
    rest = tokenizer.convert_tokens_to_ids(["Ġ7", "Ċ", "ĠThe"])
    spelled = smollm2_tokenizer("</think>", add_special_tokens=False)["input_ids"]
    assert len(spelled) > 1
    rows = random_rows([begin, *spelled], len(tokenizer), count=100, length=16, share=0.5, seed=3)
    rows += [[begin, *rest, end, *rest * 4][:16], [*rest, *spelled, *rest * 4][:16]]
    expected = assert_same(tokenizer, "</think>", rows)
    assert expected[-2].tolist() == [False] * 4 + [True] * 12 and expected[-1, -1] and not expected[:, 0].any()


def byte_characters(text):
    """The byte-level alphabet's character for each byte of `text`."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in text.encode()]
