"""Fails if a kernel of a built extension spills registers: python kernels.py CUOBJDUMP EXTENSION.

A spill is memory that each thread takes because its registers do not suffice; a kernel that moves
bytes at the rate of memory cannot afford that. A change that makes one spill should be noticed on
a machine without a GPU.
"""

import re
import subprocess
import sys
from collections import Counter

KERNEL = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def main(cuobjdump, extension):
    command = [cuobjdump, "--dump-resource-usage", extension]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    kernels, registers, spills = Counter(), Counter(), []
    for part in re.split(r"^arch = ", output, flags=re.MULTILINE)[1:]:
        arch = part.split()[0]
        for name, reg, stack, local in KERNEL.findall(part):
            kernels[arch] += 1
            registers[arch] = max(registers[arch], int(reg))
            if int(stack) or int(local):
                spills.append(f"{arch}: {name} has STACK:{stack} LOCAL:{local}")
    for arch, count in sorted(kernels.items()):
        print(f"{arch}: {count} kernels, at most {registers[arch]} registers")
    if not kernels:
        return f"cuobjdump shows no kernel in {extension}"
    return "\n".join(spills)  # exit status 0 if there are none


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
