"""Files of prompts through the engine, row by row, such that no crash costs a row.

    inputs           JSON Lines and Parquet -> rows of JSON, one at a time; count and digest
    settings         what a job was asked for, and how it differs from what was asked before
    plain            a row that is a prompt -> requests of the engine -> a line of output
    work             rows on their way through one engine, kept full
    journal, ledger  which rows are done: appended, checksummed, locked; output in order
    job              all of it together

`docs/batch.md` tells users what it promises.
"""
