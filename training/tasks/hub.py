"""The task made of a data set that the ``datasets`` library reads: from the Hugging Face hub, or from this machine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vllm_cospec.errors import ConfigError, one_line
from vllm_cospec.training.tasks.datasets import RecordOptions, Records
from vllm_cospec.training.tasks.protocol import task
from vllm_cospec.training.tasks.records import collect, read_lines, read_problem

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


class DatasetOptions(RecordOptions):
    """Of the task dataset."""

    path: str
    """Hub id; or a file (parquet, CSV, JSON) or a directory here, what ``save_to_disk`` wrote among them."""
    name: str | None = None
    """Configuration of the data set, for example main."""
    split: str = "train"
    """Its split that training and calibration problems come from."""
    test_split: str | None = None
    """Its split with the test problems; left out: an eighth of ``split``, chosen by a hash of the prompt."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


@task("dataset", DatasetOptions)
class DatasetTask(Records):
    """Problems from a data set."""

    def __init__(self, options: DatasetOptions):
        read = partial(
            read_problem, prompt_key=options.prompt_key, answer_key=options.answer_key,
            answer_format=options.answer_format,
        )  # fmt: skip
        splits = [options.split] + ([options.test_split] if options.test_split else [])
        found = [
            collect(
                library_records(options.path, options.name, split, options.revision), options.path, options.bad_lines,
                read,
            )
            for split in splits
        ]  # fmt: skip
        self.left_out = sum(count for _, count in found)
        tests = found[1][0] if len(found) > 1 else None
        super().__init__(f"task.options.path: {options.path}", options.template, found[0][0], tests)


def records_of(path: str, name: str | None, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) from a JSONL file, read line by line, or from what the library reads.

    Raises:
        ConfigError: it cannot be read.
    """
    if path.removesuffix(".gz").endswith(".jsonl"):
        return read_lines(Path(path))
    return library_records(path, name, split, revision)


def library_records(path: str, name: str | None, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of each row of one split of a data set.

    Raises:
        ConfigError: the library is missing, or does not find what is asked for.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"task.name: data sets are read with the package datasets ({error}); install it") from None
    datasets.disable_progress_bars()
    local = Path(path)
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            rows = datasets.load_from_disk(path)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        elif local.is_file():
            builder = BUILDERS.get(local.suffix)
            if builder is None:
                raise ConfigError(
                    f"task.options.path: {path!r} is none of {', '.join(BUILDERS)}; convert it, or name a directory"
                )
            rows = datasets.load_dataset(builder, data_files=path, split="train")
        else:
            rows = datasets.load_dataset(path, name, split=split, revision=revision)
    except ConfigError:
        raise
    except Exception as error:  # the library and the hub raise many unrelated types
        raise ConfigError(
            f"task.options: the data set {path!r} (name {name}, split {split}) cannot be read ({one_line(error)})"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, split {split}, row {number}", row
