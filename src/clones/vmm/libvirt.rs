//! A libvirt domain: libvirt has no element for `readonly=on,rom=off`, so the memory is defined in
//! `<qemu:commandline>`, whose `-machine memory-backend=` follows libvirt's own and overrides it.

use super::paste::VmmArguments;
use super::qemu::of_files;
use super::served::Served;
use crate::error::Result;

pub(super) fn paste(template: &Served) -> Result<VmmArguments> {
    let memory = template.one_ram("libvirt creates the memory of NUMA nodes itself")?;
    let line = of_files(template, None)?;
    let name = escape(&template.name.replace([':', '/', '@'], "-"));
    let size = memory.size.get() / 1024;
    let mut text = format!(
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\n  <name>{name}</name>\n  \
         <memory unit='KiB'>{size}</memory>\n  <os>\n    <type arch='x86_64' machine='q35'>hvm</type>\n  </os>\n  \
         <features>\n    <acpi/>\n  </features>\n  <devices>\n    \
         <memballoon model='none'/>\n  </devices>\n  <qemu:commandline>\n"
    );
    for word in line.words() {
        text.push_str(&format!("    <qemu:arg value='{}'/>\n", escape(word)));
    }
    text.push_str("  </qemu:commandline>\n</domain>");
    let mut notes = vec![
        "copy xmlns:qemu, the size of <memory>, <acpi/>, <memballoon model='none'/> and <qemu:commandline> into the \
         domain; remove <memoryBacking> and every device that needs shared or discardable memory (vhost-user, virtiofs)"
            .to_owned(),
        "the user that runs QEMU for libvirt must be able to open the files: see stencil chown and stencil chmod"
            .to_owned(),
    ];
    if template.state().is_some() {
        notes
            .push("libvirt resumes only device state that libvirt saved: the guest boots instead".to_owned());
    }
    Ok(VmmArguments { text, notes, ..VmmArguments::default() })
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::tests::served;
    use super::*;
    use crate::clones::recipe::Values;
    use crate::store::FileKind::Ram;

    #[test]
    fn escapes_paths_in_attributes() {
        let mut template = served(&[("memory", Ram, 64)]);
        let files = [("memory".to_owned(), "/m'/><x a='&".to_owned())];
        template.values = Values::new("web:1", &files, &template.roles);
        let text = paste(&template).unwrap().text;
        assert!(text.contains("mem-path=/m&apos;/&gt;&lt;x a=&apos;&amp;,align=2M"), "{text}");
        assert!(text.contains("<memory unit='KiB'>65536</memory>"), "{text}");
    }
}
