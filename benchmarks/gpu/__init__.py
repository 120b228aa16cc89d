"""What has to be seen on a GPU: right answers from the compiled kernels, their times, an engine, a sanitizer."""
