//! Corrects the command line of a VM so that the VM can be captured: moves RAM into files with `share=on`, removes
//! unsupported options, and adds the devices by which a guest detects that it was cloned.

use super::plan::{Examined, Facts, examine};
use super::props::Props;
use super::rules::{Rule, device_type, is_host_resource, rule};

/// Maximum number of passes: a correction can reveal another obstacle.
const MAX_PASSES: usize = 8;

/// An option of a command line.
struct GivenOption {
    /// Index of the first word.
    at: usize,
    /// Name without dashes; empty for a disk image without an option.
    name: String,
    /// The option and its value.
    words: Vec<String>,
}

impl GivenOption {
    fn value(&self) -> &str {
        self.words.get(1).map_or("", String::as_str)
    }

    fn props(&self) -> Option<Props> {
        let first = match self.name.as_str() {
            "object" => "qom-type",
            "device" => "driver",
            "machine" | "M" | "netdev" | "nic" | "net" => "type",
            "drive" => "file",
            "chardev" => "backend",
            _ => "driver",
        };
        let mut props = Props::parse(self.value(), first)?;
        props.lead_with(first);
        Some(props)
    }

    fn set(&mut self, value: String) {
        self.words.truncate(1);
        self.words.push(value);
    }
}

/// Splits a command line into options by the rules of [`examine`].
fn split(argv: &[String]) -> Vec<GivenOption> {
    let mut all = vec![];
    let mut words = argv.iter().enumerate();
    while let Some((at, word)) = words.next() {
        let name = word.strip_prefix('-').map(|o| o.strip_prefix('-').unwrap_or(o)).unwrap_or_default();
        let takes_value = match rule(name) {
            _ if name.is_empty() => false,
            Rule::Keep(takes) | Rule::Drop(takes) => takes,
            Rule::Unknown => false,
            _ => true,
        };
        let value = if takes_value { words.next().map(|(_, value)| value.clone()) } else { None };
        all.push(GivenOption {
            at,
            name: name.to_owned(),
            words: [Some(word.clone()), value].into_iter().flatten().collect(),
        });
    }
    all
}

/// Returns the corrected command line; `ram_file` maps the id of a memory object to the path of its file.
pub fn corrected(argv: &[String], facts: &Facts, ram_file: &dyn Fn(&str) -> String) -> Vec<String> {
    // Media that no option names (hot-plugged ones) are not part of the new VM and are dropped from the facts.
    let mut facts = facts.clone();
    let mut argv = argv.to_vec();
    for _ in 0..MAX_PASSES {
        let Ok(examined) = examine(&argv, &facts) else { break };
        let options = split(&argv);
        let fixed: Vec<String> =
            fix(options, &examined, ram_file).into_iter().flat_map(|g| g.words).collect();
        facts.disks.retain(|disk| !examined.absent.contains(disk));
        if fixed == argv {
            break;
        }
        argv = fixed;
    }
    add_devices(&mut argv, facts.machine_type.as_deref().unwrap_or_default());
    argv
}

fn fix(
    options: Vec<GivenOption>,
    examined: &Examined,
    ram_file: &dyn Fn(&str) -> String,
) -> Vec<GivenOption> {
    let is_refused = |at: usize| examined.refused.iter().any(|r| r.at == Some(at));
    let mut dropped = vec![];
    let mut kept = vec![];
    for mut option in options {
        if option.name == "incoming" {
            continue;
        }
        if examined.ram_problems.iter().any(|problem| problem.at == Some(option.at)) {
            share(&mut option, ram_file);
        } else if is_refused(option.at) && !make_supported(&mut option) {
            let id = option.props().and_then(|p| p.get("id").or(p.get("node-name")).map(str::to_owned));
            dropped.extend(id);
            continue;
        }
        kept.push(option);
    }
    // Options that refer to a dropped object are dropped too.
    kept.retain(|option| {
        let uses = |props: &Props| {
            let keys = ["netdev", "drive", "chardev", "memdev", "fsdev", "tpmdev", "file"];
            keys.iter().any(|key| props.get(key).is_some_and(|id| dropped.iter().any(|d| d == id)))
        };
        !matches!(option.name.as_str(), "device" | "blockdev" | "mon")
            || !option.props().as_ref().is_some_and(uses)
    });
    if examined.ram_problems.iter().any(|problem| problem.at.is_none()) {
        add_ram(&mut kept, &examined.ram_size, ram_file);
    }
    kept
}

/// Turns a memory object into a file with `share=on`.
fn share(object: &mut GivenOption, ram_file: &dyn Fn(&str) -> String) {
    let Some(mut props) = object.props() else { return };
    if props.get("qom-type") != Some("memory-backend-file") {
        for key in ["hugetlb", "hugetlbsize", "seal", "reserve"] {
            props.remove(key);
        }
        props.set("qom-type", "memory-backend-file");
        let id = props.get("id").unwrap_or_default().to_owned();
        props.set("mem-path", &ram_file(&id));
    }
    for key in ["readonly", "rom", "offset"] {
        props.remove(key);
    }
    props.set("share", "on");
    object.set(props.render("qom-type"));
}

/// Changes a refused option to a supported option. Returns false if there is no such change and the option must be
/// dropped.
fn make_supported(option: &mut GivenOption) -> bool {
    let Some(mut props) = option.props() else { return false };
    let before = props.clone();
    match option.name.as_str() {
        "netdev" | "nic" | "net" => {
            let kept = ["type", "id", "model", "mac", "macaddr", "netdev", "name", "addr", "vectors"];
            let keys: Vec<String> = props.iter().map(|(key, _)| key.to_owned()).collect();
            keys.iter().filter(|key| !kept.contains(&key.as_str())).for_each(|key| props.remove(key));
            if props.get("type") != Some("nic") {
                props.set("type", "user");
            }
            option.set(props.render("type"));
        }
        "drive" => {
            props.remove("snapshot");
            option.set(props.render(""));
        }
        "machine" | "M" => {
            props.remove("memory-encryption");
            props.remove("confidential-guest-support");
            option.set(props.render("type"));
        }
        "device" => {
            let of_host: Vec<String> =
                props.iter().filter(|(k, v)| is_host_resource(k, v)).map(|(k, _)| k.to_owned()).collect();
            of_host.iter().for_each(|key| props.remove(key));
            option.set(props.render("driver"));
        }
        _ => return false,
    }
    props != before
}

/// Adds a memory object for RAM that only `-m` describes.
fn add_ram(all: &mut Vec<GivenOption>, size: &str, ram_file: &dyn Fn(&str) -> String) {
    let id = "ram0";
    match all.iter_mut().rev().find(|option| matches!(option.name.as_str(), "machine" | "M")) {
        Some(machine) => {
            if let Some(mut props) = machine.props() {
                props.set("memory-backend", id);
                machine.set(props.render("type"));
            }
        }
        None => all.push(new_option("machine", format!("memory-backend={id}"))),
    }
    let path = ram_file(id).replace(',', ",,");
    let object = format!("memory-backend-file,id={id},size={size},mem-path={path},share=on");
    all.push(new_option("object", object));
}

fn new_option(name: &str, value: String) -> GivenOption {
    GivenOption { at: usize::MAX, name: name.into(), words: vec![format!("-{name}"), value] }
}

/// Adds vmgenid, by which a guest detects that it was cloned, and virtio-rng, a source of fresh random numbers.
fn add_devices(argv: &mut Vec<String>, machine: &str) {
    let has = |prefix: &str| {
        let is_it = |option: &GivenOption| {
            let props = option.props().filter(|_| option.name == "device");
            props.is_some_and(|p| device_type(p.get("driver").unwrap_or_default()).starts_with(prefix))
        };
        split(argv).iter().any(is_it)
    };
    let (has_vmgenid, has_rng) = (has("vmgenid"), has("virtio-rng"));
    let has_pci = ["pc", "q35", "virt"].iter().any(|kind| machine.starts_with(kind));
    let mut add = |words: [&str; 2]| argv.extend(words.map(str::to_owned));
    if !has_vmgenid && has_pci {
        add(["-device", "vmgenid,guid=auto"]);
    }
    if !has_rng && has_pci {
        add(["-object", "rng-random,id=stencil-rng,filename=/dev/urandom"]);
        add(["-device", "virtio-rng-pci,rng=stencil-rng"]);
    }
}

#[cfg(test)]
mod tests {
    use crate::clones::recipe::corrections::*;

    #[test]
    fn corrected_command_line_can_be_captured() {
        let facts = Facts { machine_type: Some("pc-q35-10.0".into()), disks: vec![] };
        let path = |id: &str| format!("/dev/shm/vm-{id}");
        for (line, wanted) in [
            (
                "-m 512 -nodefaults",
                "-m 512 -nodefaults -machine memory-backend=ram0 -object \
                 memory-backend-file,id=ram0,size=512M,mem-path=/dev/shm/vm-ram0,share=on",
            ),
            (
                "-M q35,memory-backend=r -object memory-backend-memfd,id=r,size=1G,seal=on -netdev tap,id=n,fd=3 \
                 -device virtio-net-pci,netdev=n -device virtio-balloon-pci -fsdev local,id=f,path=/x -incoming defer \
                 -mem-path /dev/hugepages",
                "-M q35,memory-backend=r -object memory-backend-file,id=r,size=1G,mem-path=/dev/shm/vm-r,share=on \
                 -netdev user,id=n -device virtio-net-pci,netdev=n",
            ),
        ] {
            let words: Vec<String> = line.split_ascii_whitespace().map(str::to_owned).collect();
            let argv = corrected(&words, &facts, &path);
            let text = argv.join(" ");
            let more = " -device vmgenid,guid=auto -object rng-random,id=stencil-rng,filename=/dev/urandom \
                        -device virtio-rng-pci,rng=stencil-rng";
            assert_eq!(text, format!("{wanted}{more}"));
            assert!(examine(&argv, &facts).unwrap().error().is_none());
        }
    }
}
