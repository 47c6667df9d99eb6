"""Pipelines whose items are not what the next stage takes."""

# What a refused call returns is unknown: its own error is the one to mark.
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false

from kaun import Data

words = Data.from_items(["a", "bc"])
lengths: Data[str] = words.map(len)  # E: reportAssignmentType
words.map(lambda w: w.shape)  # E: reportAttributeAccessIssue
words.map(3)  # E: reportArgumentType
words.random_map(len)  # E: reportArgumentType
words.batch("2")  # E: reportArgumentType
words.epochs()  # E: reportCallIssue
words.filter(lambda w: w.shape)  # E: reportAttributeAccessIssue
words.sample("ab", 3)  # E: reportArgumentType
Data.mix(words, [1])  # E: reportArgumentType
Data.concat([words])  # E: reportArgumentType
pair: Data[tuple[str, str]] = Data.zip(words, words.map(len))  # E: reportAssignmentType
number: int = next(iter(words))  # E: reportAssignmentType
