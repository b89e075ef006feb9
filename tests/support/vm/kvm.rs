//! A KVM guest with one vCPU whose memory is a backend; it executes code from guest address 0.
#![allow(unsafe_code)]

use std::ops::Range;

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use stencilfs::memory::Backend;

/// The guest. Its memory stays mapped until the guest is dropped.
pub struct Guest {
    _vm: VmFd,
    pub cpu: VcpuFd,
    _memory: Backend,
}

impl Guest {
    /// Creates a guest in real mode that maps each range of the memory at the guest address beside it, and starts at
    /// address 0.
    pub fn new(memory: Backend, windows: &[(u64, Range<u64>)], flags: u32) -> Guest {
        let vm = Kvm::new().expect("/dev/kvm").create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        for (slot, (guest, range)) in (0..).zip(windows) {
            assert!(range.start <= range.end && range.end <= memory.len().get(), "{range:?}");
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: *guest,
                memory_size: range.end - range.start,
                userspace_addr: memory.as_ptr() as u64 + range.start,
            };
            // SAFETY: the range lies inside the backend's memory (checked above), which the guest keeps mapped until
            // the VM is dropped, and to which there is no Rust reference.
            unsafe { vm.set_user_memory_region(region).unwrap() };
        }
        let cpu = vm.create_vcpu(0).unwrap();
        let mut special = cpu.get_sregs().unwrap();
        (special.cs.base, special.cs.selector) = (0, 0);
        cpu.set_sregs(&special).unwrap();
        let mut registers = cpu.get_regs().unwrap();
        (registers.rip, registers.rflags) = (0, 2);
        cpu.set_regs(&registers).unwrap();
        Guest { _vm: vm, cpu, _memory: memory }
    }

    /// Switches to protected mode without paging, with all segments flat from address 0.
    pub fn flat(self) -> Guest {
        let segment = |selector: u16, kind: u8| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_: kind,
            present: 1,
            dpl: 0,
            db: 1,
            s: 1,
            l: 0,
            g: 1,
            avl: 0,
            unusable: 0,
            padding: 0,
        };
        let mut special = self.cpu.get_sregs().unwrap();
        special.cs = segment(8, 11);
        let data = segment(16, 3);
        (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
        special.cr0 |= 1;
        self.cpu.set_sregs(&special).unwrap();
        self
    }
}
