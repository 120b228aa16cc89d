"""vLLM workers that install arbitration. One module per platform: the CPU's must not be imported beside a GPU."""
