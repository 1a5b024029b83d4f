"""The cases are run by ``test_triton.py``, in processes in which Triton is interpreted."""

collect_ignore_glob = ["triton_*cases.py"]
