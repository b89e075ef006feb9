/* Entry point of the 64-bit boot protocol: Firecracker maps the first GiB and sets up the segments. */
.globl _start
.section .text.start, "ax"
_start:
    mov $0x2f0000, %rsp
    cld
    call guest

/* Handler of the serial port's interrupt: it only ends a hlt. Acknowledges the interrupt at the first 8259. */
.globl on_serial
on_serial:
    push %rax
    mov $0x20, %al
    out %al, $0x20
    pop %rax
    iretq
.section .note.GNU-stack, "", @progbits
