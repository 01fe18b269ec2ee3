"""`megatron-sft report RUN`: one page of one or several runs, from their own files."""
