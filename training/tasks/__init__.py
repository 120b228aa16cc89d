"""Tasks: where problems come from and how an answer is scored.

    >>> from vllm_cospec.training.tasks import load_task
    >>> load_task("demo").problems(seed=1, n=2)

Importing this package registers the tasks that come with it.
"""

from vllm_cospec.training.tasks import (  # noqa: F401 - registers them
    code_lines,
    code_problems,
    datasets,
    demo,
    generators,
    hub,
    product_and_sums,
)
from vllm_cospec.training.tasks.protocol import (
    FurtherFigures,
    Options,
    Problem,
    Task,
    digest,
    load_task,
    task,
    task_names,
)
from vllm_cospec.training.tasks.splits import Split, split_of

__all__ = [
    "FurtherFigures",
    "Options",
    "Problem",
    "Split",
    "Task",
    "digest",
    "load_task",
    "split_of",
    "task",
    "task_names",
]
