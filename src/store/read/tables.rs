//! Opens the tables of a template, image and placement, and verifies their headers.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::tree::{ChainingValue, CheckedTable, SEGMENT, root, segment_value, segments};
use crate::error::Result;
use crate::store::Digest;
use crate::store::disk::path::StorePath;
use crate::store::format::image::ImageHeader;
use crate::store::format::placement::Front;
use crate::store::format::{Invalid, Preamble};
use crate::units::to_usize;

fn open_file(what: &str, path: &StorePath) -> Result<(File, u64)> {
    let open = || {
        let file = path.file()?;
        let length = file.metadata()?.len();
        Ok((file, length))
    };
    open().map_err(|e: std::io::Error| match e.kind() {
        std::io::ErrorKind::NotFound => Invalid::damage("the file is missing").in_file(what, path),
        _ => path.error(format!("cannot open {what}"), e),
    })
}

/// Opens a placement of the template with this digest. Returns its front, the checksums of the image's segments, and
/// the rows.
///
/// # Errors
/// Returns [`Code::Damage`](crate::error::Code) if the file is missing or damaged.
pub(super) fn open_placement(
    path: &StorePath,
    digest: &Digest,
) -> Result<(Front, Vec<ChainingValue>, CheckedTable)> {
    let what = "placement";
    let damage = |why: String| Invalid::Damage(why).in_file(what, path);
    let (file, length) = open_file(what, path)?;
    let read = |offset: u64, length: u64| {
        let mut bytes = vec![0; to_usize(length)];
        file.read_exact_at(&mut bytes, offset)
            .map_err(|e| damage(format!("cannot read the file: {}", crate::error::errno_text(&e))))?;
        Ok(bytes)
    };
    if length < Preamble::LEN as u64 {
        return Err(damage(format!(
            "truncated: length is {length}, expected at least {} bytes",
            Preamble::LEN
        )));
    }
    let front_length = Front::peek(&read(0, Preamble::LEN as u64)?).map_err(|e| e.in_file(what, path))?;
    if u64::from(front_length) > length {
        return Err(damage(format!("truncated: length is {length}, expected at least {front_length} bytes")));
    }
    let front = Front::decode(&read(0, front_length.into())?).map_err(|e| e.in_file(what, path))?;
    if front.digest != *digest {
        return Err(damage(format!("header names template {}, expected {digest}", front.digest)));
    }
    let sections = front.sections(segments);
    if sections.end != length {
        return Err(damage(format!("length is {length}, expected {} bytes", sections.end)));
    }
    let values = |from, to| Ok(read(from, to - from)?.as_chunks::<32>().0.to_vec());
    let image_values = values(sections.image_tree, sections.rows_tree)?;
    let rows_values = values(sections.rows_tree, sections.end)?;
    if root(&image_values, front.image_length) != Some(*digest) {
        return Err(damage("checksums of the image do not match the template's digest".into()));
    }
    let range = (sections.rows, sections.rows_length);
    let rows = CheckedTable::new(what, path.as_ref(), file, range, rows_values, &front.rows_root)?;
    Ok((front, image_values, rows))
}

/// Opens the image of a template, whose placement has this front and these checksums.
///
/// # Errors
/// Same as [`open_placement`].
pub(super) fn open_image(
    path: &StorePath,
    digest: &Digest,
    front: &Front,
    values: Vec<ChainingValue>,
) -> Result<(ImageHeader, CheckedTable)> {
    let what = "image";
    let damage = |why: String| Invalid::Damage(why).in_file(what, path);
    let (file, length) = open_file(what, path)?;
    if length != front.image_length {
        return Err(damage(format!("length is {length}, expected {} bytes", front.image_length)));
    }
    let mut head = vec![0; length.min(SEGMENT) as usize];
    file.read_exact_at(&mut head, 0)
        .map_err(|e| damage(format!("cannot read the file: {}", crate::error::errno_text(&e))))?;
    if values.first() != Some(&segment_value(&head, 0, segments(length))) {
        return Err(damage("header does not match its checksum".into()));
    }
    let table = CheckedTable::new(what, path.as_ref(), file, (0, length), values, digest)?;
    let header = ImageHeader::decode(&head).map_err(|e| e.in_file(what, path))?;
    let fits = header.image_length() == length
        && header.block_count() == front.block_count
        && header.files().len() == front.files.len();
    match fits {
        true => Ok((header, table)),
        false => Err(damage("header does not match the placement".into())),
    }
}
