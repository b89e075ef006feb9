//! A small VMM: runs a guest whose RAM is a template's file, mapped copy-on-write, until the guest halts, and prints
//! the pages that the guest has copied.
//!
//! ```sh
//! cargo run --no-default-features --features rust-vmm --example vmm -- /srv/templates/templates/guest/1/memory
//! ```
//!
//! The guest has one vCPU, which starts in real mode at address 0 of the file. Bytes that it writes to port 0x3f8 are
//! printed.
#![allow(unsafe_code)]

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use stencilfs::memory::{Backend, CopiedPages, Protection};
use stencilfs::units::{PAGE_SIZE, to_usize};
use stencilfs::vm_memory::bitmap::Bitmap;
use stencilfs::vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// RAM that would reach into the addresses of devices continues at 4 GiB.
const DEVICES: u64 = 3 << 30;
const ABOVE_DEVICES: u64 = 4 << 30;

const SERIAL_PORT: u16 = 0x3f8;

/// Address of a page that KVM itself uses for real mode on Intel CPUs. It lies between the addresses of devices.
const TSS: usize = 0xfffb_d000;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: vmm FILE");
        return ExitCode::from(2);
    };
    match Backend::template(path).map_err(Into::into).and_then(|memory| run(&memory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(memory: &Backend) -> Result<(), Box<dyn Error>> {
    let ram = guest_ram(memory)?;
    let vm = Kvm::new()?.create_vm()?;
    vm.set_tss_address(TSS)?;
    add_ram(&vm, &ram, memory.protection())?;
    let mut cpu = real_mode_cpu(&vm)?;
    run_until_halt(&mut cpu)?;
    print_copied(&ram);
    Ok(())
}

/// Lays out the memory as the RAM of a PC: one part below the addresses of devices, and the rest at 4 GiB.
fn guest_ram(memory: &Backend) -> Result<GuestMemoryMmap<CopiedPages>, Box<dyn Error>> {
    let size = memory.len().get();
    let mut regions = vec![memory.guest_region(GuestAddress(0), 0..size.min(DEVICES))?];
    if size > DEVICES {
        regions.push(memory.guest_region(GuestAddress(ABOVE_DEVICES), DEVICES..size)?);
    }
    // The regions keep the memory mapped from here on.
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

fn add_ram(
    vm: &VmFd,
    ram: &GuestMemoryMmap<CopiedPages>,
    protection: Protection,
) -> Result<(), kvm_ioctls::Error> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if protection == Protection::Read { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: `run` drops the VM before the region that keeps these addresses mapped. The process has no Rust
        // reference into the memory.
        unsafe { vm.set_user_memory_region(slot)? };
    }
    Ok(())
}

fn real_mode_cpu(vm: &VmFd) -> Result<VcpuFd, kvm_ioctls::Error> {
    let cpu = vm.create_vcpu(0)?;
    let mut special = cpu.get_sregs()?;
    (special.cs.base, special.cs.selector) = (0, 0);
    cpu.set_sregs(&special)?;
    let mut registers = cpu.get_regs()?;
    // Bit 1 of the flags is always set.
    (registers.rip, registers.rflags) = (0, 2);
    cpu.set_regs(&registers)?;
    Ok(cpu)
}

fn run_until_halt(cpu: &mut VcpuFd) -> Result<(), Box<dyn Error>> {
    loop {
        match cpu.run()? {
            VcpuExit::Hlt => return Ok(()),
            VcpuExit::IoOut(SERIAL_PORT, bytes) => std::io::stdout().write_all(bytes)?,
            other => return Err(format!("unexpected exit of the guest: {other:?}").into()),
        }
    }
}

/// Prints the number of copied pages, and the guest address of each. A VMM would write these pages into a snapshot: all
/// other pages are those of the template.
fn print_copied(ram: &GuestMemoryMmap<CopiedPages>) {
    let mut copied = Vec::new();
    for region in ram.iter() {
        let pages = (0..region.len()).step_by(to_usize(PAGE_SIZE));
        let dirty = pages.filter(|offset| region.bitmap().dirty_at(to_usize(*offset)));
        copied.extend(dirty.map(|offset| region.start_addr().0 + offset));
    }
    let pages = ram.iter().map(GuestMemoryRegion::len).sum::<u64>() / PAGE_SIZE;
    println!("the guest has copied {} of {pages} pages", copied.len());
    copied.iter().for_each(|address| println!("{address:#x}"));
}
