/* A guest for Firecracker without an operating system. It writes known words into two ranges of its memory, prints `R`,
 * and then executes commands of one letter that arrive at the serial port. It halts until an interrupt of the port, so
 * that it takes no processor time without a command. Each answer ends with a letter and a newline:
 *
 *     w   write 64 pages from 5 MiB, every second one        W
 *     z   write 16 pages from 32 MiB, which were zero        Z
 *     n   write the next 16 pages from 48 MiB                N
 *     m   read the next 32 known pages from 64 MiB           K (as written) or X
 *     r   read the 512 known pages from 4 MiB                K or X
 *     a   read the 1024 known pages from 64 MiB              K or X
 *     b   give 256 pages at 64 MiB to the balloon, then      first words of two of these pages afterwards, L; E without
 *         write to one of them                               a balloon
 *     e   give the last 256 of 128 MiB to the balloon        the same
 *     H   halt                                               none
 *
 * Memory: code from 2 MiB, stack below 0x2f0000, variables and queues of the balloon from 3 MiB.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/* Guest-physical memory, which is mapped at the same addresses. */
#define AT(type, address) (*(volatile type *)(unsigned long)(address))

#define PAGE 0x1000
#define SERIAL 0x3f8
/* Number of `n` and `m` commands so far, address of the balloon's registers. */
#define WRITTEN 0x310000
#define READ 0x310004
#define BALLOON 0x310008
#define FIRST 0x400000
#define FIRST_PAGES 512
#define SECOND 0x4000000
#define SECOND_PAGES 1024

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0,%1" ::"a"(value), "Nd"(port)); }

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1,%0" : "=a"(value) : "Nd"(port));
    return value;
}

static void answer(u8 letter)
{
    outb(SERIAL, letter);
    outb(SERIAL, '\n');
}

static void print(u32 value)
{
    for (int shift = 28; shift >= 0; shift -= 4)
        outb(SERIAL, "0123456789abcdef"[value >> shift & 15]);
    outb(SERIAL, ' ');
}

static void fill(u32 from, u32 pages)
{
    for (u32 i = 0; i < pages; i++) {
        AT(u32, from + i * PAGE) = 0xa5000000 + i;
        AT(u32, from + i * PAGE + 2048) = 0xa5000000 + i;
    }
}

static void check(u32 from, u32 begin, u32 pages)
{
    int same = 1;
    for (u32 i = begin; i < begin + pages; i++)
        same &= AT(u32, from + i * PAGE) == 0xa5000000 + i && AT(u32, from + i * PAGE + 2048) == 0xa5000000 + i;
    answer(same ? 'K' : 'X');
}

static void write(u32 from, u32 step, u32 pages)
{
    for (u32 i = 0; i < pages; i++)
        AT(u8, from + i * step + 100) = 0x77;
}

/* The balloon: virtio over MMIO, specification 1.2, sections 4.2.2 (registers) and 2.7 (split queues). */
#define DEVICE_ID 0x08
#define DRIVER_FEATURES 0x20
#define DRIVER_FEATURES_SELECT 0x24
#define QUEUE_SELECT 0x30
#define QUEUE_SIZE 0x38
#define QUEUE_READY 0x44
#define QUEUE_NOTIFY 0x50
#define STATUS 0x70
#define QUEUE_DESCRIPTORS 0x80
#define QUEUE_AVAILABLE 0x90
#define QUEUE_USED 0xa0
#define QUEUES 0x320000
#define PAGE_NUMBERS 0x340000

static u32 find_balloon(void)
{
    /* Page tables of Firecracker's boot protocol: the page at 0xa000 lists the GiBs. The devices are in the fourth. */
    u64 *directory = (u64 *)0x12000;
    for (u64 i = 0; i < 512; i++)
        directory[i] = (0xc0000000 + i * 0x200000) | 0x83;
    AT(u64, 0xa000 + 3 * 8) = 0x12003;
    __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory");
    static const u32 bases[] = {0xd0000000, 0xc0000000};
    for (u32 base = 0; base < 2; base++)
        for (u32 device = bases[base]; device < bases[base] + 8 * PAGE; device += PAGE)
            if (AT(u32, device) == 0x74726976 && AT(u32, device + DEVICE_ID) == 5)
                return device;
    return 0;
}

static void start_balloon(u32 device)
{
    /* Reset, then ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK one after the other. */
    AT(u32, device + STATUS) = 0;
    AT(u32, device + STATUS) = 1;
    AT(u32, device + STATUS) = 3;
    AT(u32, device + DRIVER_FEATURES_SELECT) = 1;
    AT(u32, device + DRIVER_FEATURES) = 1; /* VIRTIO_F_VERSION_1 */
    AT(u32, device + DRIVER_FEATURES_SELECT) = 0;
    AT(u32, device + DRIVER_FEATURES) = 0;
    AT(u32, device + STATUS) = 11;
    for (u32 queue = 0; queue < 2; queue++) {
        u32 base = QUEUES + queue * 3 * PAGE;
        AT(u32, device + QUEUE_SELECT) = queue;
        AT(u32, device + QUEUE_SIZE) = 16;
        /* The upper halves of the addresses are zero after the reset. */
        AT(u32, device + QUEUE_DESCRIPTORS) = base;
        AT(u32, device + QUEUE_AVAILABLE) = base + PAGE;
        AT(u32, device + QUEUE_USED) = base + 2 * PAGE;
        AT(u32, device + QUEUE_READY) = 1;
    }
    AT(u32, device + STATUS) = 15;
}

static void inflate(u32 device, u32 from, u32 pages)
{
    for (u32 i = 0; i < pages; i++)
        AT(u32, PAGE_NUMBERS + i * 4) = from / PAGE + i;
    AT(u64, QUEUES) = PAGE_NUMBERS;
    AT(u32, QUEUES + 8) = pages * 4;
    AT(u32, QUEUES + 12) = 0;
    u16 index = AT(u16, QUEUES + PAGE + 2);
    AT(u16, QUEUES + PAGE + 4 + (index & 15) * 2) = 0;
    __asm__ volatile("mfence");
    AT(u16, QUEUES + PAGE + 2) = ++index;
    AT(u32, device + QUEUE_NOTIFY) = 0;
    while (AT(u16, QUEUES + 2 * PAGE + 2) != index)
        ;
}

static void give(u32 from)
{
    if (!AT(u32, BALLOON))
        return answer('E');
    inflate(AT(u32, BALLOON), from, 256);
    print(AT(u32, from));
    print(AT(u32, from + 200 * PAGE));
    AT(u32, from + 10 * PAGE) = 0x5a5a5a5a;
    answer('L');
}

static void execute(u8 command)
{
    switch (command) {
    case 'w':
        write(0x500000, 2 * PAGE, 64);
        return answer('W');
    case 'z':
        write(0x2000000, PAGE, 16);
        return answer('Z');
    case 'n':
        write(0x3000000 + AT(u32, WRITTEN)++ * 16 * PAGE, PAGE, 16);
        return answer('N');
    case 'm':
        return check(SECOND, AT(u32, READ)++ * 32, 32);
    case 'r':
        return check(FIRST, 0, FIRST_PAGES);
    case 'a':
        return check(SECOND, 0, SECOND_PAGES);
    case 'b':
        return give(SECOND);
    case 'e':
        return give(0x8000000 - 256 * PAGE);
    case 'H':
        __asm__ volatile("cli; hlt");
    }
}

/* Line 4 of the first 8259, whose lines begin at vector 0x20. */
#define SERIAL_VECTOR 0x24
#define GATE_PRESENT_INTERRUPT 0x8e00

extern const u8 on_serial[];

static void enable_serial_interrupt(void)
{
    static u64 gates[2 * (SERIAL_VECTOR + 1)];
    static struct __attribute__((packed)) {
        u16 limit;
        u64 base;
    } table;
    u64 handler = (u64)on_serial;
    u16 code;
    __asm__ volatile("mov %%cs, %0" : "=r"(code));
    gates[2 * SERIAL_VECTOR] = (handler & 0xffff) | (u64)code << 16 | (u64)GATE_PRESENT_INTERRUPT << 32 |
                               (handler >> 16 & 0xffff) << 48;
    gates[2 * SERIAL_VECTOR + 1] = handler >> 32;
    table.limit = sizeof gates - 1;
    table.base = (u64)gates;
    __asm__ volatile("lidt %0" ::"m"(table));
    /* Initialization words 1 to 4, then the mask: all lines but 4 of the first chip, and all of the second. */
    static const u8 first[] = {0x20, 4, 1, 0xef}, second[] = {0x28, 2, 1, 0xff};
    outb(0x20, 0x11);
    outb(0xa0, 0x11);
    for (int i = 0; i < 4; i++) {
        outb(0x21, first[i]);
        outb(0xa1, second[i]);
    }
    /* Interrupt enable: a byte has arrived. Firecracker does the same for a guest that it restores. */
    outb(SERIAL + 1, 1);
}

void guest(void)
{
    fill(FIRST, FIRST_PAGES);
    fill(SECOND, SECOND_PAGES);
    AT(u32, WRITTEN) = AT(u32, READ) = 0;
    AT(u32, BALLOON) = find_balloon();
    if (AT(u32, BALLOON))
        start_balloon(AT(u32, BALLOON));
    enable_serial_interrupt();
    answer('R');
    for (;;) {
        __asm__ volatile("cli");
        /* Bit 0 of the line status: a byte has arrived. */
        if (inb(SERIAL + 5) & 1) {
            execute(inb(SERIAL));
        } else {
            /* Reading the interrupt identification clears it. A byte that has arrived since the look ends the hlt. */
            inb(SERIAL + 2);
            __asm__ volatile("sti; hlt");
        }
    }
}
