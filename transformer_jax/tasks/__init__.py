"""What models learn: one file a task, all known by name; see :class:`transformer_jax.tasks.base.Task`."""

from transformer_jax.tasks.base import Task, TaskData, get, make, name_of, names, register

__all__ = ["Task", "TaskData", "get", "make", "name_of", "names", "register"]
