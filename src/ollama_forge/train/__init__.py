import os

# torch's own switch for huge pages (c10/core/impl/alloc_cpu.cpp, 2.13), which it reads at its first large allocation:
# peft's import makes one, so it is set here. Linux only.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
