//! Snapshots as Cloud Hypervisor writes them, field by field from its sources, with default features on x86_64:
//! `config.json` from `struct VmConfig` in `vmm/src/vm_config.rs`, `state.json` from `struct Snapshot` and `struct
//! SnapshotData` in `vm-migration/src/lib.rs` with `struct MemoryManagerSnapshotData` in `vmm/src/memory_manager.rs`
//! and `struct MemoryRangeTable` in `vm-migration/src/protocol.rs`. The state of CPUs and devices is left out.

use serde_json::{Value, json};

/// Versions whose sources were read: the tags v44.0 and v51.0, and the main branch that calls itself 54.0.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V44,
    V51,
    V54,
}

pub const VERSIONS: [Version; 3] = [Version::V44, Version::V51, Version::V54];

/// A part of guest memory: its zone, guest address, size and offset in the file of its zone.
pub type Region<'a> = (&'a str, u64, u64, u64);

/// Builds `config.json` of a VM with two CPUs, a disk, a network device, a vsock device and a serial console.
pub fn config(version: Version, memory: Value) -> Value {
    let mut config = json!({
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2, "topology": null, "kvm_hyperv": false, "max_phys_bits": 46,
                 "affinity": null, "features": {"amx": false}},
        "memory": memory,
        "payload": {"firmware": null, "kernel": "/boot/vmlinux", "cmdline": "console=ttyS0", "initramfs": null},
        "rate_limit_groups": null,
        "disks": [{"path": "/var/lib/web.raw", "readonly": false, "direct": false, "iommu": false, "num_queues": 1,
                   "queue_size": 128, "vhost_user": false, "vhost_socket": null, "rate_limit_group": null,
                   "rate_limiter_config": null, "id": "_disk0", "disable_io_uring": false, "disable_aio": false,
                   "pci_segment": 0, "serial": null, "queue_affinity": null}],
        "net": [{"tap": "tap0", "ip": "192.168.249.1", "mask": "255.255.255.0", "mac": "2e:89:a8:e4:92:b6",
                 "host_mac": null, "mtu": null, "iommu": false, "num_queues": 2, "queue_size": 256,
                 "vhost_user": false, "vhost_socket": null, "vhost_mode": "Client", "id": "_net1", "fds": null,
                 "rate_limiter_config": null, "pci_segment": 0, "offload_tso": true, "offload_ufo": true,
                 "offload_csum": true}],
        "rng": {"src": "/dev/urandom", "iommu": false},
        "balloon": null, "fs": null, "pmem": null,
        "serial": {"file": "/var/log/web.serial", "mode": "File", "iommu": false, "socket": null},
        "console": {"file": null, "mode": "Off", "iommu": false, "socket": null},
        "debug_console": {"file": null, "mode": "Off", "iobase": 233},
        "devices": null, "user_devices": null, "vdpa": null,
        "vsock": {"cid": 3, "socket": "/run/web.vsock", "iommu": false, "id": "_vsock2", "pci_segment": 0},
        "pvpanic": false, "iommu": false, "numa": null, "watchdog": false, "pci_segments": null, "platform": null,
        "tpm": null, "landlock_enable": false, "landlock_rules": null,
    });
    match version {
        Version::V44 => config["sgx_epc"] = Value::Null,
        Version::V51 | Version::V54 => {
            config["cpus"]["nested"] = json!(true);
            for (key, value) in
                [("backing_files", json!(false)), ("sparse", json!(true)), ("image_type", json!("Raw"))]
            {
                config["disks"][0][key] = value;
            }
            for key in ["ip", "mask"] {
                config["net"][0][key] = Value::Null;
            }
        }
    }
    if version == Version::V54 {
        // This version writes neither `None` nor, in a device's common fields, `iommu: false`.
        config["cpus"]["core_scheduling"] = json!("Vm");
        config["cpus"]["profile"] = json!("Host");
        config["disks"][0]["lock_granularity"] = json!("ByteRange");
        remove(&mut config, &|key, value| value.is_null() || key == "iommu");
        config["iommu"] = json!(false);
        config["rng"]["pci_segment"] = json!(0);
        config["console"]["pci_segment"] = json!(0);
    }
    config
}

fn remove(value: &mut Value, unwritten: &dyn Fn(&str, &Value) -> bool) {
    match value {
        Value::Object(fields) => {
            fields.retain(|key, value| !unwritten(key, value));
            fields.values_mut().for_each(|value| remove(value, unwritten));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| remove(value, unwritten)),
        _ => {}
    }
}

/// The memory of `--memory size=SIZE`.
pub fn anonymous(version: Version, size: u64) -> Value {
    let mut memory = json!({
        "size": size, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null, "hotplugged_size": null,
        "shared": false, "hugepages": false, "hugepage_size": null, "prefault": false, "zones": null, "thp": true,
    });
    if version == Version::V54 {
        memory["reserve"] = json!(false);
    }
    memory
}

/// The memory of `--memory size=0 --memory-zone id=ID,size=SIZE[,file=FILE,shared=on] …`.
pub fn zones(version: Version, zones: &[(&str, u64, Option<&str>)]) -> Value {
    let zone = |(id, size, file): &(&str, u64, Option<&str>)| {
        let mut zone = json!({
            "id": id, "size": size, "file": file, "shared": file.is_some(), "hugepages": false, "hugepage_size": null,
            "host_numa_node": null, "hotplug_size": null, "hotplugged_size": null, "prefault": false,
        });
        if version == Version::V54 {
            zone["reserve"] = json!(false);
            zone["mergeable"] = json!(false);
        }
        zone
    };
    let mut memory = anonymous(version, 0);
    memory["zones"] = zones.iter().map(zone).collect();
    memory
}

/// Builds `state.json`. `saved` are the regions whose contents are in `memory-ranges`, in the order of that file.
pub fn state(regions: &[Region<'_>], saved: &[Region<'_>]) -> Value {
    let ranges: Vec<Value> =
        saved.iter().map(|(_, gpa, length, _)| json!({"gpa": gpa, "length": length})).collect();
    let mappings = (0..).zip(regions).map(|(slot, (zone, gpa, size, offset)): (u32, _)| {
        json!({"slot": slot, "gpa": gpa, "size": size, "zone_id": zone, "virtio_mem": false, "file_offset": offset})
    });
    let total: u64 = regions.iter().map(|region| region.2).sum();
    let slots =
        vec![json!({"base": 0, "length": 0, "active": false, "inserting": false, "removing": false}); 8];
    let manager = json!({
        "memory_ranges": {"data": ranges},
        "guest_ram_mappings": mappings.collect::<Vec<_>>(),
        "start_of_device_area": 4294967296u64, "boot_ram": total, "current_ram": total,
        "arch_mem_regions": [{"base": 0, "size": 3221225472u64, "r_type": "Ram"},
                             {"base": 3221225472u64, "size": 671088640, "r_type": "SubRegion"},
                             {"base": 4294967296u64, "size": 18446744069414584320u64, "r_type": "Ram"}],
        "hotplug_slots": slots, "next_memory_slot": regions.len(), "selected_slot": 0, "next_hotplug_slot": 0,
    });
    let part = |state: &Value| json!({"snapshots": {}, "snapshot_data": {"state": state.to_string()}});
    let cpu = json!({"snapshots": {"0": part(&json!({"tsc_khz": 2100000}))}, "snapshot_data": null});
    json!({
        "snapshots": {
            "cpu-manager": cpu,
            "device-manager": part(&json!({"device_tree": {}, "device_id_cnt": 3})),
            "memory-manager": part(&manager),
        },
        "snapshot_data": {"state": json!({"clock": {"clock": 7u64, "flags": 2}, "common_cpuid": []}).to_string()},
    })
}
