"""The table of bigrams against a loop over tokens, and beside a Llama."""

import pytest
import torch
from tiny_cram import ids, make
from transformers import LlamaConfig, LlamaForCausalLM

from cramlab.language_model.bigrams import BigramTable
from cramlab.language_model.block import Tokens
from cramlab.language_model.llama_with_bigrams import LlamaWithBigrams
from cramlab.language_model.modeling import CRAMForCausalLM, CRAMForCausalLMConfig
from cramlab.language_model.packed_rows import Packing, documents
from cramlab.mixer import Routing

VOCAB, SLOTS, D = 50, 31, 8


def table():
    made = BigramTable(SLOTS, VOCAB, D, 2)
    torch.nn.init.normal_(made.table)
    return made


def by_loop(made, tokens, valid=None, starts=()):
    """Rows of one sequence, token by token."""
    previous, rows = VOCAB, []
    for t, token in enumerate(tokens.tolist()):
        if t in starts:
            previous = VOCAB
        slot = (previous * 1_540_483_477 + token * 668_265_263) % (2**31 - 1) % SLOTS
        rows.append(made.table[slot])
        if valid is None or valid[t]:
            previous = token
    return torch.stack(rows)


def test_rows_are_those_of_a_loop_with_padding_anywhere():
    made, tokens = table(), ids(4, 20)
    valid = torch.rand(4, 20) < 0.6
    valid[3] = False
    found = made(tokens, valid, None, None)
    for b in range(4):
        assert torch.equal(found.rows[b, valid[b]], by_loop(made, tokens[b], valid[b])[valid[b]])
        seen = tokens[b, valid[b]]
        assert found.newest[b] == (seen[-1] if len(seen) else VOCAB)
    assert torch.equal(made(tokens, None, None, None).rows[0], by_loop(made, tokens[0]))


def test_calls_that_follow_each_other_are_one_call():
    made, tokens, valid = table(), ids(3, 20), torch.rand(3, 20) < 0.6
    whole, before, parts = made(tokens, valid, None, None), None, []
    for start, end in ((0, 7), (7, 7), (7, 8), (8, 20)):
        found = made(tokens[:, start:end].int(), valid[:, start:end], None, before)
        before = found.newest
        parts.append(found.rows)
    rows = torch.cat(parts, dim=1)
    assert torch.equal(rows[valid], whole.rows[valid])
    assert torch.equal(before, whole.newest)


def test_documents_of_a_packed_row_begin_anew():
    made, tokens = table(), ids(1, 12)
    position = torch.cat([torch.arange(n) for n in (5, 1, 6)])[None]
    packed = documents(Packing(position), (1, 12))
    assert torch.equal(made(tokens, None, packed, None).rows[0], by_loop(made, tokens[0], starts=(5, 6)))


def test_slots_are_spread_evenly_and_fit_into_63_bits():
    made = BigramTable(997, 2**20, 1, 1)
    pairs = torch.cartesian_prod(torch.arange(300), torch.arange(300))
    counts = torch.bincount(made.slots(pairs[:, 0], pairs[:, 1]), minlength=997).double()
    assert counts.min() > 60  # 90 each
    assert counts.max() < 120
    most = torch.tensor([2**31 - 1])
    exact = ((2**31 - 1) * (1_540_483_477 + 668_265_263)) % (2**31 - 1) % 997
    assert int(made.slots(most, most)) == exact


def test_a_fresh_table_changes_nothing_and_learns():
    torch.manual_seed(0)
    plain = make()
    with_table = CRAMForCausalLM(CRAMForCausalLMConfig(**plain.config.to_dict() | {"bigram_slots": SLOTS})).eval()
    missing, _ = with_table.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {"bigrams.table", "bigrams.scale"}
    tokens = ids()
    assert torch.equal(with_table(tokens).logits, plain(tokens).logits)
    with_table(tokens, labels=tokens).loss.backward()
    assert with_table.bigrams.table.grad.abs().sum() > 0
    torch.optim.SGD(with_table.parameters(), lr=1.0).step()
    with_table(tokens, labels=tokens).loss.backward()
    assert (with_table.bigrams.scale.grad != 0).all()


def test_every_block_adds_its_share():
    model, tokens = make(bigram_slots=SLOTS), ids()
    rows = model.bigrams(tokens, None, None, None).rows
    hidden = model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[0], model.embed_tokens(tokens) + model.bigrams.scale[0] * rows)
    first = model.layers[0](hidden[0], Tokens(torch.ones(3, 20), None, None), Routing())[0]
    torch.testing.assert_close(hidden[1], first + model.bigrams.scale[1] * rows)


def test_embeddings_without_tokens_are_refused():
    model = make(bigram_slots=SLOTS)
    with pytest.raises(ValueError, match=r"inputs_embeds has no token numbers, which bigram_slots = 31 needs"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="bigram_slots = -1 must be 0"):
        make(bigram_slots=-1)


def test_its_parameters_and_bytes_are_counted():
    plain, with_table = make(), make(bigram_slots=SLOTS)
    assert with_table.num_parameters() - plain.num_parameters() == SLOTS * 32 + 2
    assert with_table.bigrams.cost(100).parameter_bytes == 4 * (SLOTS * 32 + 2)
    cache = with_table(ids(), use_cache=True).past_key_values
    newest = cache.layers[0].newest
    assert newest.numel() * newest.element_size() == 3 * with_table.bigrams.cost(100).state_bytes
    assert cache.layers[1].newest is None


def llama():
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip


def test_a_llama_with_a_fresh_table_is_the_llama():
    plain, with_table = LlamaForCausalLM(llama()).eval(), LlamaWithBigrams(llama(), SLOTS).eval()
    missing, unexpected = with_table.load_state_dict(plain.state_dict(), strict=False)
    assert (set(missing), unexpected) == ({"bigrams.table", "bigrams.scale"}, [])
    tokens = ids()
    torch.testing.assert_close(with_table(tokens).logits, plain(tokens).logits)
    torch.testing.assert_close(with_table(tokens, labels=tokens).loss, plain(tokens, labels=tokens).loss)


def test_a_llama_adds_the_rows_before_every_layer_and_learns_them():
    model, tokens = LlamaWithBigrams(llama(), SLOTS), ids()
    with torch.no_grad():
        model.bigrams.table.normal_()
    rows, seen = model.bigrams(tokens, None, None, None).rows, []
    hooks = [layer.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
             for layer in model.model.layers]  # fmt: skip
    model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close(seen[0], model.model.embed_tokens(tokens) + rows)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for hook in hooks:
        hook.remove()
    before = model(tokens).logits
    with torch.no_grad():
        model.bigrams.scale[1] = 0.0
    assert not torch.allclose(model(tokens).logits, before)
    padded = torch.nn.functional.pad(tokens, (0, 3), value=7)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, 3))
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :20], model(tokens).logits)


def test_a_llama_with_bigrams_refuses_what_it_cannot_do():
    model = LlamaWithBigrams(llama(), SLOTS)
    with pytest.raises(ValueError, match="position_ids cannot be honoured"):
        model(ids(), position_ids=torch.arange(20)[None])


def test_one_graph_serves_all_layers_of_a_llama_with_bigrams():
    model, tokens, graphs = LlamaWithBigrams(llama(), SLOTS), ids(), []
    with torch.no_grad():
        model.bigrams.table.normal_()
        model.bigrams.scale[1] = 3.0
    plain = model(tokens).logits
    torch.compiler.reset()

    def counted(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    for layer in model.model.layers:
        layer.compile(backend=counted)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain)
    assert len(graphs) == 1
