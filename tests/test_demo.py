"""The demo: its text, its formulas against the mods they judge, its verdicts, and one small run."""
from __future__ import annotations

import pytest
import torch

import flexref
from flexref.__main__ import main
from flexref.cli import demo, pictures, text
from flexref.cli.cases import make_cases, sdpa_bytes, sdpa_mask
from flexref.cli.judge import judge, sampled_rows

LENGTH = 1024


@pytest.fixture(scope="module")
def cases():
    documents = text.documents(LENGTH)
    return make_cases(text.packed(documents, 2, 16), text.batched(documents, 2, 16))


def names(cases):
    return [case.name for case in cases]


def test_documents_are_real_whole_and_ragged():
    documents = text.documents(16384)
    lengths = [len(document) for document in documents]
    assert sum(lengths) >= 16384 > sum(lengths[:-1])
    assert len(set(lengths)) > 5 and max(lengths) <= 4096
    assert documents == text.documents(16384)


def test_embeddings_are_fixed():
    first, second = (text.packed(text.documents(LENGTH), 2, 16) for _ in range(2))
    assert torch.equal(first.query, second.query)
    assert first.query.shape == (1, 2, sum(first.lengths), 16)


def test_every_variant_of_the_article_is_there(cases):
    wanted = "full, relative position, ALiBi, soft-capping, causal by score_mod, causal by mask, sliding window + causal, "
    wanted += "PrefixLM, document mask, ragged batch, window + document + causal, soft-cap + ALiBi + document"
    assert names(cases) == wanted.split(", ")


def test_formulas_say_what_the_mods_say(cases):
    """The mods are called on whole index tensors, as PyTorch would."""
    for case in cases:
        batch, heads, length, _ = case.inputs.query.shape
        b = torch.arange(batch)[:, None, None, None]
        h, i, j = torch.arange(heads)[:, None, None], torch.arange(0, length, 7)[:, None], torch.arange(length)
        s = torch.randn(batch, heads, len(i), length, dtype=torch.float64)
        expected = s if case.score is None else case.score(s, b, h, i, j)
        if case.allowed is not None:
            expected = expected.masked_fill(~case.allowed(b, h, i, j), -torch.inf)
        got = s if case.score_mod is None else case.score_mod(s, b, h, i, j)
        if case.mask_mod is not None:
            got = got.masked_fill(~case.mask_mod(b, h, i, j), -torch.inf)
        torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-6, atol=1e-6, msg=lambda m, c=case: f"{c.name}: {m}")


def test_sdpa_with_the_dense_mask_is_the_same_attention(cases):
    for case in cases:
        if not case.additive:
            continue
        query, key, value, _ = case.inputs
        mask = sdpa_mask(case)
        assert mask is None or mask.numel() * mask.element_size() <= sdpa_bytes(case)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        # SDPA's answer for a row with nothing allowed is its own
        if case.name != "ragged batch":
            torch.testing.assert_close(out, flexref.flex_attention(query, key, value, case.score_mod, mask_mod=case.mask_mod))


def test_a_wrong_row_is_over_budget(cases):
    case = cases[names(cases).index("causal by mask")]
    query, key, value, _ = case.inputs
    out = flexref.flex_attention(query, key, value, mask_mod=case.mask_mod)
    good = judge(case, out)
    assert not good.complaint and 0 <= good.ratio <= 1 and good.error < 1e-4
    out[0, 1, int(sampled_rows(out.shape[2])[3])] += 1e-3
    bad = judge(case, out)
    assert "over the error budget" in bad.complaint and bad.error > 5e-4


def test_a_small_run_makes_a_table_and_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["demo", "--length", "1024", "--heads", "2", "--head-dim", "16", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for part in ("numba_cpu", "sparsity", "budget", "ragged batch", "soft-cap + ALiBi + document", "variants.png"):
        assert part in said
    assert (tmp_path / "out" / "variants.png").read_bytes().startswith(b"\x89PNG")


def test_the_run_fails_if_an_error_is_over_budget(tmp_path, capsys, monkeypatch):
    right = flexref.flex_attention
    monkeypatch.setattr(demo, "make_cases", lambda *inputs: make_cases(*inputs)[:1])
    monkeypatch.setattr(demo.flexref, "flex_attention", lambda *a, **k: right(*a, **k) * 1.01)
    monkeypatch.setattr(pictures, "draw", lambda *a: "no pictures")
    assert main(["demo", "--length", "1024", "--heads", "1", "--head-dim", "8", "--no-sdpa", "--output", str(tmp_path)]) == 1
    assert "over budget" in capsys.readouterr().out


def test_the_demo_refuses_sizes_that_mean_nothing(capsys):
    assert main(["demo", "--length", "10"]) == 2
    assert "at least 1024" in capsys.readouterr().out


def test_pictures_do_without_matplotlib(cases, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    told = pictures.draw(cases, tmp_path)
    assert told.startswith("no pictures: ") and "pip install 'flexref[visualize]'" in told
