"""What inside.py shows is what the model computes."""
import http.client
import json
import threading

import pytest
import torch
from conftest import CAPTIONS, rounding, tiny
from PIL import Image

import inside
from common.serve import server
from encoders.clip import CLIPTokenizer
from encoders.t5 import Tokenizer
from inside import Inside, Watch, words_of_tokens
from sample import Pipeline

PROMPT = "a red circle above a green square"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return Pipeline.load(tiny(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Pipeline.load(tiny(tmp_path_factory.mktemp("video"), temporal=True))


def test_watching_changes_nothing(picture, clip):
    for model, guidance in ((picture, dict(lambda_t=3.0)), (clip, dict(lambda_t=3.0, lambda_m=1.5))):
        plain = model.generate([PROMPT], seed=4, sampler="ddim", steps=3, **guidance)
        seen = Inside(model, PROMPT, 4, "ddim", 3, 3.0, 1.5)
        assert (seen.result.int() - plain.view_as(seen.result).int()).abs().max() <= 1
        layers = [module.attend for module in model.modules() if hasattr(module, "attend")]
        assert not any("partial" in str(layer) for layer in layers) and not model.transformer._forward_hooks
        assert len(seen.times) == 3 and len(seen.own) == 2 and seen.cross.shape[:2] == (3, 2)


def test_the_terms_of_guidance_add_up_to_what_the_sampler_used(picture, clip):
    for model, guidance in ((picture, (3.0, 1.0)), (picture, (1.0, 1.0)), (clip, (3.0, 1.5)), (clip, (3.0, 1.0))):
        seen = Inside(model, PROMPT, 0, "ddim", 3, *guidance)
        last = inside.to_bytes(seen.decoded(seen.x0[-1])).view_as(seen.result)
        assert (last.int() - seen.result.int()).abs().max() <= 1  # ddim returns the last x_0
        assert len(seen.terms) == 1 + (guidance[0] != 1) + (guidance[1] != 1)


def test_weights_by_hand(picture, clip):
    for model in (picture, clip):
        seen = Inside(model, PROMPT, 0, "sde", 2, 2.0, 1.5)
        for weights in (seen.own, seen.temporal if seen.clip else seen.own):
            assert torch.allclose(weights.sum(-1), torch.tensor(1.0), atol=rounding(weights, weights.shape[-1]))
        assert torch.allclose(seen.cross.sum(-1), torch.tensor(1.0), atol=1e-5)  # the null text is never read
        layers = [block.cross_attention.attention.q for block in model.transformer.blocks]
        before = [layer.state_dict() for layer in layers]
        before = [{name: tensor.clone() for name, tensor in state.items()} for state in before]
        for layer in layers:  # without a question, all tokens are read alike
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        seen = Inside(model, PROMPT, 0, "sde", 2, 2.0, 1.5)
        for layer, state in zip(layers, before):
            layer.load_state_dict(state)
        tokens = len(model.tokenizer.encode(PROMPT)) + 1
        counts = [len(model.tokenizer.encode(word)) for word in PROMPT.split()] + [1]
        assert seen.words == [*PROMPT.split(), "(end)"]
        expected = torch.tensor(counts) / tokens
        assert torch.allclose(seen.cross, expected.expand_as(seen.cross), atol=1e-5)


def test_a_motion_free_twin(clip):
    with Watch(clip.transformer, still=True) as watch:
        clip.generate([PROMPT], 0, "sde", 3, 2.0, 1.5)
    assert torch.equal(watch.mean("temporal"), torch.eye(3).expand(2, 3, 3))
    x = torch.randn(1, 3, 4, 4, 4)
    text, mask = clip.encode_text(clip.tokenize([PROMPT]))
    free = lambda value: dict(text=text, text_mask=mask, motion_free=torch.tensor([value]))
    with torch.no_grad():
        expected = clip.transformer(x, torch.tensor([500]), **free(True))
        with Watch(clip.transformer, still=True):
            assert torch.equal(clip.transformer(x, torch.tensor([500]), **free(False)), expected)


def test_sheets_show_the_weights(clip):
    seen = Inside(clip, PROMPT, 0, "ddim", 3, 2.0, 1.5)
    seen.result = torch.full_like(seen.result, 200)
    weights = torch.zeros(2, 4, 2)  # two rows, four patches, two words
    weights[0, 1, 0], weights[1, 2, 0], weights[1, 3, 1] = 0.25, 0.5, 0.1
    words, seen.words = seen.words, ["a", "red"]
    light = lambda share: 200 * (0.15 + 0.85 * share)
    sheet = inside.words(seen, weights, ["first", "second"], [0, 0]).convert("L")
    width, height = (sheet.size[0] - 4) // 2, (sheet.size[1] - 4) // 2
    tile = lambda row, word, patch: sheet.getpixel((8 + word * width + patch % 2 * 64, 8 + row * height + patch // 2 * 64))
    expected = {(0, 0, 1): 0.5, (1, 0, 2): 1, (1, 1, 3): 1, (0, 0, 0): 0, (0, 1, 3): 0, (1, 0, 1): 0}
    assert all(abs(tile(*place) - light(share)) <= 1 for place, share in expected.items())
    seen.words = words
    shown = dict(inside.sheets(seen, patch=2))
    chosen = shown["patch"].convert("L")  # the first tile: the patch itself
    assert abs(chosen.getpixel((8, 4 + 2 * 32 - 8)) - 200) <= 1 and abs(chosen.getpixel((4 + 2 * 32 - 8, 8)) - 30) <= 1
    F, zoom = 3, 32
    mask = [[shown["frames"].getpixel((4 + 2 * (F * zoom + 4) + j * zoom + 9, 4 + i * zoom + 9))[0] for j in range(F)] for i in range(F)]
    assert mask == [[255 * (i == j) for j in range(F)] for i in range(F)]
    first = [[shown["frames"].getpixel((4 + j * zoom + 9, 4 + i * zoom + 9))[0] for j in range(F)] for i in range(F)]
    assert (torch.tensor(first) - 255 * seen.temporal[0] / seen.temporal.max()).abs().max() <= 1


def test_words_of_tokens(byte_pairs):
    for tokenizer in (Tokenizer.train(CAPTIONS), CLIPTokenizer.read(byte_pairs)):
        words = ["a", "red", "circleish", "a"]
        found = words_of_tokens(tokenizer, words)
        tokens, _ = tokenizer([" ".join(words)])
        assert found.shape == (tokens.shape[1], 5) and found[-1].tolist() == [0, 0, 0, 0, 1]
        ids = [tokens[0][found[:, column] > 0].tolist() for column in range(4)]
        assert ids == [tokenizer.encode(word) for word in words]


def test_the_command(tmp_path, monkeypatch, picture, clip):
    monkeypatch.chdir(tmp_path)
    for name, model in (("image", picture), ("video", clip)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        model.save(tmp_path / "runs" / name / "model.safetensors")
    common = {"steps", "terms", "words", "words-by-step", "patch", "schedule", "positions"}
    inside.main([PROMPT, "--steps", "3", "--patch", "0,1"])
    assert {path.name for path in (tmp_path / "inside").iterdir()} == {f"{name}.png" for name in (*common, "result")}
    inside.main(["--video", PROMPT, "--steps", "3"])
    expected = {f"{name}.png" for name in (*common, "frames", "words-by-frame")} | {"result.gif"}
    assert {path.name for path in (tmp_path / "inside-clip").iterdir()} == expected
    with Image.open(tmp_path / "inside-clip" / "result.gif") as image:
        assert image.size[0] >= 96
    for words, message in (
        ([], "give one prompt"), (["a", "b"], "give one prompt"), ([PROMPT, "--patch", "2,0"], "--patch 2,0: must be ROW,COLUMN, below 2 and 2"),
        ([PROMPT, "--lambda-m", "2"], "--lambda-m 2.0: of clips only"), (["--serve", PROMPT], "--serve: the page has the rest"),
        (["--video", PROMPT, "--checkpoint", "runs/image"], "runs/image holds an image model: leave out --video"),
    ):
        with pytest.raises(ValueError, match=message):
            inside.main(words)


@pytest.fixture
def page(picture, clip):
    """A function that sends a request to a running page: (status, text)."""
    models = {"picture": picture, "clip": clip}
    with server(inside.PAGE, inside.answerer(models), 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def send(method="POST", question=None, path="/", kind="application/json", host=None, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=60)
            headers = {"Content-Type": kind, "Host": host or f"127.0.0.1:{running.server_port}"} | headers
            body = question if isinstance(question, str) else json.dumps(question)
            connection.request(method, path, body if method == "POST" else None, headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

        yield send
        running.shutdown()


def test_the_page_answers_only_to_its_own_name(page):
    status, text = page("GET")
    assert status == 200 and "Inside GenTron" in text
    for host in ("evil.example", "127.0.0.1", "127.0.0.1:80", "evil.example:8000"):
        assert page("GET", host=host)[0] == page(question={"hello": True}, host=host)[0] == 403
    assert page("GET", path="/etc/passwd")[0] == 404
    assert page(question={"hello": True}, kind="text/plain")[0] == 415
    for length in ("2000000", "9" * 5000):
        assert page(question={}, **{"Content-Length": length})[0] == 413
    assert page(question={}, **{"Content-Length": "-1"})[0] == 415
    assert json.loads(page(question={"hello": True})[1]) == dict(kinds=["picture", "clip"], samplers=["ddpm", "ddim", "dpm", "sde"])


def test_the_page_draws(page):
    status, text = page(question=dict(kind="clip", prompt=f" {PROMPT} zebra", steps=5, lambda_m=1.5))
    found = json.loads(text)
    assert status == 200 and len(found["result"]) == len(found["twin"]) == 3 and len(found["times"]) == len(found["x0"]) == 5
    assert found["cross"]["shape"] == [5, 2, 3, 4, 9] and found["temporal"]["shape"] == [2, 3, 3]
    assert "zebra" in found["notes"][0] and found["words"][-2:] == ["zebra", "(end)"]
    status, text = page(question=dict(kind="picture", prompt=PROMPT, steps=2))
    assert status == 200 and json.loads(text)["own"]["shape"] == [2, 1, 4, 4] and "twin" not in json.loads(text)


@pytest.mark.parametrize("question, line", [
    (dict(prompt=""), "type a prompt"), (dict(prompt="a", steps=0), "steps 0: must be from 1 to 100"),
    (dict(prompt="a", steps=2.5), "steps: not a value"), (dict(prompt="a", lambda_t="3"), "lambda_t: not a value"),
    (dict(prompt="a", sampler="euler"), "sampler euler: not one of"), (dict(prompt=["a"]), "prompt: not a value"),
    (dict(prompt="a", kind="film"), "kind film: not one of"), (dict(prompt="a", other=1), "other: not a value"),
    ("[1]", "a question is a JSON dictionary"), ("{", "a question is a JSON dictionary"), (dict(prompt="a", seed=-1), "seed -1: must be"),
    (dict(prompt="a", seed=True), "seed: not a value"), ('{"prompt": "a", "lambda_t": NaN}', "lambda-t nan: must be"),
])
def test_a_bad_value_gets_one_line(page, question, line):
    status, text = page(question=question)
    assert status == 400 and json.loads(text)["error"].startswith(line) and "\n" not in json.loads(text)["error"]


def test_several_tabs_wait_their_turn(page):
    one = lambda seed: json.loads(page(question=dict(prompt=PROMPT, steps=2, seed=seed))[1])["result"]
    alone = [one(seed) for seed in range(4)]
    found = {}

    def ask(seed):
        found[seed] = one(seed)

    tabs = [threading.Thread(target=ask, args=[seed]) for seed in range(4)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert [found[seed] for seed in range(4)] == alone and len({str(result) for result in alone}) == 4
