/* Entry point of the 64-bit boot protocol: Firecracker maps the first GiB and sets up the segments. */
.globl _start
.section .text.start, "ax"
_start:
    mov $0x2f0000, %rsp
    cld
    call guest
.section .note.GNU-stack, "", @progbits
