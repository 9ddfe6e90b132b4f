"""A mistake of the user ends a program with one clear line and exit status 2, and loses no
files."""

import fcntl
import json
import subprocess

import pytest

SENTENCE = "the king said to his men that night we would come home\n"
TINY = ("--config=shakespeare_char", "--config.model.num_layers=1", "--config.model.num_heads=2",
        "--config.model.model_dim=16", "--config.model.max_len=16", "--config.model.unroll=1", "--config.batch_size=8",
        "--config.steps=2", "--config.eval.every=2", "--config.sample.every=0", "--config.optim.warmup_steps=1")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(SENTENCE * 40)
    return path


@pytest.fixture
def train(program, tmp_path, text):
    """Trains on the text with changed arguments."""
    def run(*changes, path=text, workdir=tmp_path / "run"):
        return program("train", *TINY, f"--config.data.path={path}", f"--workdir={workdir}", *changes)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A saved model with a character tokenizer, not trained."""
    import jax

    import transformer_jax as tj

    workdir = tmp_path_factory.mktemp("trained")
    tokenizer = tj.Tokenizer.train([SENTENCE], kind="char")
    config = tj.ModelConfig(vocab_size=tokenizer.vocab_size, max_len=16, num_layers=1, num_heads=2, model_dim=16)
    model = jax.jit(lambda key: tj.Decoder(config, key=key))(jax.random.key(0))
    tj.save(workdir, tj.Bundle(model=model, tokenizer=tokenizer, config=config, step=3))
    return workdir


# Flags and settings


@pytest.mark.parametrize(("change", "message"), [
    ("--config.optm.peak_lr=1", "ExperimentConfig has no field 'optm'; did you mean 'optim'?"),
    ("--config.optim.peak_l=1", "OptimConfig has no field 'peak_l'; did you mean 'peak_lr'?"),
    ("--config.data.tokenizer.vocab=9", "TokenizerConfig has no field 'vocab'; did you mean 'vocab_size'?"),
    ("--config.steps.many=1", "--config.steps.many does not exist, because --config.steps is a "
                               "value, not a group of settings; --help lists all settings"),
    ("--config.optim=adamw", "--config.optim is a group of settings; set one of its fields, as in "
                             "--config.optim.name=..."),
    ("--config.steps=many", "flag --config.steps=many: invalid literal for int() with base 10: 'many'"),
    ("--config.steps=1.5", "flag --config.steps=1.5: invalid literal for int() with base 10: '1.5'"),
    ("--config.optim.peak_lr=high", "flag --config.optim.peak_lr=high: could not convert string to float: 'high'"),
    ("--config.model.use_bias=maybe", "flag --config.model.use_bias=maybe: "),
    ("--config.steps=0", "steps=0 must be a positive integer"),
    ("--config.optim.name=adam", "name='adam' is not one of adamw, adafactor, lion, sgd, muon; did you mean 'adamw'?"),
    ("--config.model.num_heads=3", "model_dim=16 is not divisible by num_heads=3; change one of them or set head_dim"),
    ("--config.model.num_kv_heads=4", "num_heads=2 is not a multiple of num_kv_heads=4"),
    ("--config.optim.accumulation=3", "batch_size=8 must be a multiple of optim.accumulation=3"),
    ("--config.batch_size=12", "batch_size=12 cannot be split evenly over the 8 devices of mesh.data x mesh.fsdp x "
                               "mesh.expert; choose a multiple of 8"),
    ("--config.mesh.tensor=3", "mesh data=None x fsdp=1 x expert=1 x sequence=1 x tensor=3 does not multiply out "
                               "to the 8 devices here; change one of them"),
    ("--config.eval.max_batches=0", "eval.max_batches=0 must be a positive integer"),
    ("--config.sample.temperature=-1", "sample.temperature=-1.0 must not be negative"),
    ("--config.model.vocab_size=9", "model.vocab_size=9, but the tokenizer has 24 tokens; leave model.vocab_size out"),
    ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ("stray", "unexpected argument 'stray'; flags are written --name=value"),
])
def test_settings(train, tmp_path, change, message):
    error = train(change).error
    assert error == f"error: {message}" or (message.endswith(": ") and error.startswith(f"error: {message}"))
    assert not list(tmp_path.glob("run/*.json")), "a run that never began must not claim its directory"


def test_rows_of_a_device_that_do_not_split(train):
    assert train("--config.optim.gradient_dtype=float32", "--config.optim.accumulation=2").error == (
        "error: with optim.gradient_dtype the 1 rows of a device, which are batch_size=8 over 8 devices, must split "
        "into optim.accumulation=2 parts")


def test_a_prompt_for_samples_that_is_too_long(train):
    error = train("--config.sample.every=1", f"--config.sample.prompt={SENTENCE}").error
    assert error == ("error: sample.prompt has 55 tokens, so that no token can be added within model.max_len=16; "
                     "use a shorter prompt")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config=shakespeare_chr", "--workdir=x"], "there is no experiment and no config file 'shakespeare_chr'; "
                                                  "did you mean 'shakespeare_char'?; named experiments: "),
    (["--config", "/no/such.py", "--workdir=x"], "there is no experiment and no config file '/no/such.py'; named "
                                                 "experiments: "),
    (["--workdir=x"], "--config is missing; named experiments: "),
    (["--config=shakespeare_char"], "--workdir is missing: "),
    (["--config", "shakespeare_char", "--workdir=x"],
     "set exactly one source of training data: --config.data.path=FILE (text, glob or "),
    (["--config=shakespeare_char", "--workdir=x", "--config.data.path=a", "--config.data.tfds=b"],
     "set exactly one source of training data: "),
    (["--config.steps=3", "--config=shakespeare_char"], "--workdir is missing"),  # flags come in any order
])
def test_how_a_run_is_named(program, arguments, message):
    assert program("train", *arguments).error.startswith(f"error: {message}")


def test_the_quickstart_has_its_own_text(program, text):
    assert "always trains on Python's documentation" in program("quickstart", f"--config.data.path={text}").error


# Texts


@pytest.mark.parametrize(("content", "message"), [
    (b"", "{path} is empty; expected UTF-8 text"),
    (b"caf\xe9 au lait", "{path} is not UTF-8: byte offset 3: invalid continuation byte"),
    (b"nothing\0here", "{path} has a NUL character at byte offset 7; is it a text file?"),
    (SENTENCE.encode(), "the text is shorter than one window: 6 tokens available, 17 needed (length 16 and the last "
                        "target); give more text or a smaller length"),
])
@pytest.mark.long
def test_texts(train, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert train(path=path).error == f"error: {message.format(path=path)}"
    # After the error, a second try with another text succeeds.
    assert train().status == 0


def test_no_such_text(train, tmp_path):
    message = "expected a file, a directory with files or a glob pattern"
    assert train(path=tmp_path / "none.txt").error == f"error: no text file at '{tmp_path}/none.txt': {message}"


def test_jsonl_without_the_key(train, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"body": SENTENCE}) + "\n")
    assert train(path=path).error == (f"error: {path}, line 1 has no text under the key 'text'; found the keys "
                                      "['body']")


def test_a_vocabulary_that_the_text_does_not_support(train):
    error = train("--config.data.tokenizer.kind=bpe", "--config.data.tokenizer.vocab_size=9000").error
    assert error.startswith("error: vocab_size=9000 is larger than this text supports: at most ")


@pytest.mark.long
def test_byte_order_marks_are_removed_and_crlf_is_kept_with_a_warning(train, tmp_path, caplog):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbf" + SENTENCE.replace("\n", "\r\n").encode() * 40)
    ended = train(path=path)
    assert ended.status == 0
    assert "byte order mark, which is removed" in caplog.text and "CRLF; they are kept" in caplog.text
    num_tokens = 1 + 40 * (len(SENTENCE) + 1)
    cut = int(num_tokens * 0.9)
    assert ended.out.startswith(f"{cut:,} tokens to train on, {num_tokens - cut} held out")


# Workdirs


@pytest.mark.long
def test_a_workdir_of_another_run(train, tmp_path, text):
    assert train().status == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if path.name != ".lock")
    error = train("--config.optim.peak_lr=0.5", "--config.steps=3", "--config.log_every=1").error
    assert error == (f"error: {tmp_path}/run holds a run with another config (optim.peak_lr: 0.001 -> "
                     "0.5); use another --workdir, or the same settings to resume; or add --change (in Python "
                     "change=True) to continue with the new settings")
    text.write_text(SENTENCE * 41)
    assert train().error == (f"error: the training data is not the same as when the run in {tmp_path}/run started; "
                             "use another --workdir, or the same training data to resume")
    text.write_text(SENTENCE * 40)
    after = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*") if path.name != ".lock")
    changed = {path.name for path, _ in set(after) ^ set(before)}
    assert all(name == "data" or name.startswith("tokens-") for name in changed)  # the other text, tokenised


def test_a_workdir_in_use(train, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train().error == (f"error: another run is using {tmp_path}/run; wait until it ends, or use "
                                 "another workdir")
    assert train().status == 0


def test_a_workdir_that_is_a_file(train, tmp_path):
    (tmp_path / "file").write_text("")
    assert train(workdir=tmp_path / "file").error == (
        f"error: the workdir {tmp_path}/file cannot be made, because it, or a part of its path, is a file; use another "
        "workdir")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, where this machine lets the test mount one; call it with mount
    options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
        mounts.append(disk)
        return disk

    mounts = []
    yield mount
    for _ in mounts:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_read_only_disk(train, small_disk):
    disk = small_disk("size=2m")
    assert train("--config.steps=2", workdir=disk / "run").status == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert train(workdir=disk / "run").error == f"error: {disk}/run/.lock: Read-only file system"
    assert train(workdir=disk / "new").error == f"error: {disk}/new: Read-only file system"


@pytest.mark.long
def test_a_full_disk(train, small_disk, program):
    disk = small_disk("size=1m")
    more = ("--config.checkpoint.every=1", "--config.checkpoint.keep=50", "--config.eval.every=50", "--config.steps=50")
    error = train(*more, workdir=disk / "run").error
    assert "No space left on device" in error and f"{disk}/run" in error
    # The earlier checkpoints are intact, and the same command continues when the disk has room
    # again.
    assert program("evaluate", f"--workdir={disk}/run", f"--data={__file__}").status == 0
    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    ended = train(*more, workdir=disk / "run")
    assert ended.status == 0 and "resuming from step" in ended.out


# A trained model


@pytest.mark.parametrize(("arguments", "message"), [
    (["--top_p=0"], "top_p=0.0 must be in (0, 1]"),
    (["--top_p=1.5"], "top_p=1.5 must be in (0, 1]"),
    (["--temperature=-0.1"], "temperature=-0.1 must be 0 (greedy) or positive"),
    (["--top_k=-1"], "top_k=-1 must be "),
    (["--min_p=2"], "min_p=2.0 must be in [0, 1]"),
    (["--max_new_tokens=0"], "max_new_tokens=0 must be a whole number, at least 1"),
    (["--stop="], "a stop string is empty: it would stop every text before its first token"),
    (["--stream", "--num_samples=2"], "--stream can print one text only, but --num_samples="),
    (["--prompt=the king said to his men"], "a prompt of 24 tokens leaves no room in the model's context of 16; "
                                            "shorten it"),
    (["--step=newest"], "step 'newest' is neither a number nor 'best'"),
    (["--step=7"], "{workdir}/checkpoints holds steps [3], not 7"),
    (["--step=best"], "there is no checkpoint in {workdir}; train one with python -m experiments.train"),
    (["stray"], "unexpected argument 'stray'; flags are written --name=value"),
])
@pytest.mark.parametrize("streams", [False, True])
def test_generate(program, trained, arguments, message, streams):
    if streams and "--stream" not in arguments and "--num_samples" not in arguments:
        arguments = [*arguments, "--stream"]
    ended = program("generate", f"--workdir={trained}", *arguments)
    assert ended.error.startswith(f"error: {message.format(workdir=trained)}")


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("generate", [], "--workdir is missing: the directory of a run, which transformer-jax train wrote"),
    ("generate", ["--workdir=/no/such"], "there is no directory /no/such"),
    ("evaluate", ["--workdir={trained}"], "no data to measure on is given"),
    ("evaluate", ["--data=/no/such"], "--workdir is missing"),
    ("evaluate", ["--workdir=/no/such", f"--data={__file__}"], "there is no directory /no/such"),
    ("evaluate", ["--workdir={trained}", "--data=/no/such"], "no text file at '/no/such': "),
    ("evaluate", ["--workdir=x", "--data=x", "--batch_size=0"], "flag --batch_size=0: "),
])
def test_programs_end_with_one_line_about_a_wrong_argument(program, trained, name, arguments, message):
    arguments = [argument.format(trained=trained) for argument in arguments]
    assert program(name, *arguments).error.startswith(f"error: {message}")


def test_a_program_of_its_own_process_ends_the_same_way(start):
    process = start("generate", "--workdir=/no/such")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (2, "", "error: there is no directory /no/such\n")
