"""The weights the hf engine samples with: shared, copied, synced, adapted, broken; the modes of the model."""

from __future__ import annotations

import asyncio
import threading

import pytest
import tiny_engine
import torch
from tiny_engine import FAMILIES, PROMPTS, alone, greedy, make_model, together

from treegrpo.rollout.engine import EngineError, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")
tokenizer, make_engine = tiny_engine.tokenizer, tiny_engine.make_engine


def test_broken_weights_are_an_error(make_engine):
    model = make_model()
    engine = make_engine(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="NaN"):
        together(engine, [([5], greedy())])


@pytest.mark.parametrize("copies", [False, True])
def test_sync_weights_changes_the_output_and_drops_the_caches(copies, make_engine):
    model, other = make_model(0), make_model(1)
    engine = make_engine(model, copy_weights=copies)
    call = [(PROMPTS[1], greedy())]
    before = together(engine, call, "s")[0]
    engine.sync_weights(other)
    after = together(engine, call, "s")[0]
    assert after.num_prefilled == len(PROMPTS[1])
    assert before.token_ids == alone(model, PROMPTS[1])
    assert after.token_ids == alone(other, PROMPTS[1]) != before.token_ids


def test_a_copy_is_out_of_the_trainers_reach(make_engine):
    model = make_model()
    engine = make_engine(model, copy_weights=True)
    before = together(engine, [(PROMPTS[1], greedy())])[0].token_ids
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == before
    engine.sync_weights(model)
    assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == alone(model, PROMPTS[1]) != before


def test_a_copy_samples_in_a_thread_while_the_model_is_trained(make_engine):
    model = make_model()
    engine = make_engine(model, copy_weights=True)
    calls = [(prompt, SamplingParams(max_tokens=40, seed=i)) for i, prompt in enumerate(PROMPTS)]
    expected = [result.token_ids for result in together(engine, calls)]
    results = []
    thread = threading.Thread(target=lambda: results.extend(together(engine, calls)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    thread.start()
    steps = 0
    while thread.is_alive():
        ids = torch.tensor([PROMPTS[4]], device=model.device)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        steps += 1
    thread.join()
    assert steps > 0 and all(module.training for module in model.modules())
    assert [result.token_ids for result in results] == expected


def test_adapters_are_sampled_and_synced(make_engine):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config).eval()
    shared, copied = make_engine(model), make_engine(model, copy_weights=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(20.0)
    copied.sync_weights(model)
    for engine in (shared, copied):
        assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == alone(model, PROMPTS[1])
    assert alone(model, PROMPTS[1]) != alone(make_model(), PROMPTS[1])


def test_dropout_is_off_while_sampling_and_back_on_afterwards(make_engine):
    model = make_model(**FAMILIES["gpt2"], resid_pdrop=0.5, embd_pdrop=0.5)
    expected = alone(model, PROMPTS[1])
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    engine = make_engine(model)
    assert together(engine, [(PROMPTS[1], greedy())])[0].token_ids == expected
    assert [module.training for module in model.modules()] == modes
    # what was sampled through the model can still be trained
    ids = torch.tensor([PROMPTS[1]], device=model.device)
    model(ids, labels=ids).loss.backward()


def test_weights_are_not_swapped_under_a_running_completion(make_engine):
    engine = make_engine(ends=False)

    async def run():
        task = asyncio.ensure_future(engine.generate([5], greedy(100)))
        await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match="await them first"):
            engine.sync_weights(engine._model)
        await task

    asyncio.run(run())
