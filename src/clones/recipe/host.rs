//! What is known of the host files behind a VM's disks, from QMP.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// A medium that the VM has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDisk {
    /// Name of its block backend: the id of `-drive`; empty with `-blockdev`.
    pub device: String,
    /// Where its device is in QEMU's tree.
    pub qdev: String,
    /// Name of its uppermost block node.
    pub node: String,
    /// True when the guest cannot write to it.
    pub read_only: bool,
    /// Its image and those beneath it.
    pub image: Image,
}

/// One image of a chain, as QEMU has opened it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Where it is, in QEMU's eyes.
    pub path: PathBuf,
    /// `qcow2`, `raw`…
    pub format: String,
    /// Size that the guest sees, in bytes.
    pub size: u64,
    /// What it takes unwritten blocks from.
    pub backing: Option<Box<Image>>,
}

impl LiveDisk {
    /// Those of an answer to `query-block`; or the names of those that QEMU tells nothing usable of.
    pub fn all(answer: &Value) -> Result<Vec<LiveDisk>, Vec<String>> {
        let text = |v: &Value, key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (mut disks, mut against) = (vec![], vec![]);
        for one in answer.as_array().into_iter().flatten() {
            let Some(inserted) = one.get("inserted") else { continue };
            let (device, qdev) = (text(one, "device"), text(one, "qdev"));
            let name = [&device, &qdev].into_iter().find(|n| !n.is_empty()).cloned();
            let name = name.unwrap_or_else(|| "without a name".into());
            match inserted.get("image").map(Image::read) {
                Some(Ok(image)) => disks.push(LiveDisk {
                    device,
                    qdev,
                    node: text(inserted, "node-name"),
                    read_only: inserted.get("ro").and_then(Value::as_bool).unwrap_or(false),
                    image,
                }),
                Some(Err(why)) => against.push(format!("disk {name}: {why}")),
                None => against.push(format!("disk {name}: QEMU does not tell its image")),
            }
        }
        if against.is_empty() { Ok(disks) } else { Err(against) }
    }
}

impl Image {
    fn read(value: &Value) -> Result<Image, String> {
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let (Some(path), Some(format), Some(size)) =
            (text("filename"), text("format"), value.get("virtual-size").and_then(Value::as_u64))
        else {
            return Err("QEMU does not tell its image".into());
        };
        if path.starts_with("json:") {
            return Err(format!("its image cannot be named by one path ({path})"));
        }
        if let Some((scheme, _)) = path.split_once(':')
            && !path.starts_with('/')
        {
            return Err(format!("{path} is no file of this host but {scheme}"));
        }
        let format = if format == "file" { "raw" } else { format };
        if !matches!(format, "qcow2" | "raw") {
            return Err(format!("{path} has format {format}; clones can have qcow2 and raw"));
        }
        if value.get("encrypted").and_then(Value::as_bool) == Some(true) {
            return Err(format!("{path} is encrypted"));
        }
        if value.pointer("/format-specific/data/data-file").is_some() {
            return Err(format!("{path} keeps its data in another file"));
        }
        let backing = match value.get("backing-image") {
            Some(backing) => Some(Box::new(Image::read(backing)?)),
            None if value.get("backing-filename").is_some() => {
                return Err(format!("{path}: QEMU does not tell the image beneath it"));
            }
            None => None,
        };
        Ok(Image { path: path.into(), format: format.into(), size, backing })
    }

    /// The chain from this image down.
    pub fn chain(&self) -> impl Iterator<Item = &Image> {
        std::iter::successors(Some(self), |image| image.backing.as_deref())
    }

    /// The chain in the words of qemu-img, with each path as `place` gives it. Nothing is guessed: neither format
    /// nor backing file is taken from what stands in an image that a guest can write.
    pub fn to_json(&self, place: &dyn Fn(&Path) -> PathBuf) -> Value {
        let mut all = json!({
            "driver": self.format,
            "file": {"driver": "file", "filename": place(&self.path)},
        });
        if self.format == "qcow2" {
            all["backing"] = self.backing.as_ref().map_or(Value::Null, |backing| backing.to_json(place));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(image: Value) -> Value {
        json!([{"device": "virtio0", "qdev": "", "inserted": {"node-name": "#b1", "ro": false, "image": image}},
               {"device": "cd0", "removable": true}])
    }

    #[test]
    fn a_chain_is_read_and_given_to_qemu_img() {
        let base = json!({"filename": "/b.raw", "format": "raw", "virtual-size": 512});
        let top =
            json!({"filename": "/t.qcow2", "format": "qcow2", "virtual-size": 1024, "backing-image": base});
        let disks = LiveDisk::all(&block(top)).unwrap();
        assert_eq!((disks.len(), disks[0].image.chain().count()), (1, 2));
        let words = disks[0].image.to_json(&|path| Path::new("/root").join(path.strip_prefix("/").unwrap()));
        assert_eq!(words["backing"]["file"]["filename"], "/root/b.raw");
        assert_eq!(words["driver"], "qcow2");
        assert!(words["backing"].get("backing").is_none(), "a raw image has none");
    }

    #[test]
    fn what_is_no_plain_file_is_named() {
        for (image, words) in [
            (json!({"filename": "nbd://h/x", "format": "raw", "virtual-size": 1}), "nbd"),
            (json!({"filename": "/x", "format": "vmdk", "virtual-size": 1}), "vmdk"),
            (json!({"filename": "json:{}", "format": "raw", "virtual-size": 1}), "one path"),
            (json!({"filename": "/x", "format": "qcow2", "virtual-size": 1, "encrypted": true}), "encrypted"),
            (
                json!({"filename": "/x", "format": "qcow2", "virtual-size": 1, "backing-filename": "/y"}),
                "beneath",
            ),
            (json!({}), "does not tell"),
        ] {
            let against = LiveDisk::all(&block(image)).unwrap_err();
            assert!(against[0].contains(words) && against[0].starts_with("disk virtio0"), "{against:?}");
        }
    }
}
